"""The jobs that wait for the batch, those in it, and what becomes of them.

Everything here runs on the decoding thread, but for ``fail``, which any may call.
"""

from __future__ import annotations

import functools
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from mlx_receiver.decode.jobs import Job, Memory, Output, Sink
from mlx_receiver.decode.turns import GAP_SECONDS, JOINS, PROMPTS, Turns
from mlx_receiver.metrics import Metrics
from mlx_receiver.wire.messages import E_CAPACITY, E_INTERNAL, E_UNSUPPORTED, Code, WireError
from mlx_receiver.wire.sampling import Sampling
from mlx_receiver.wire.stopping import check_stop

if TYPE_CHECKING:
    from mlx_receiver.decode.batch import Batch
    from mlx_receiver.decode.speed import Speed

logger = logging.getLogger(__name__)

#: Seconds in which jobs may join whoever else wants the time: most copy nothing, and a burst of
#: hand-offs would wait for as many chunks of others' prompts.
_JOIN_SECONDS: Final = GAP_SECONDS / 10

#: Lets a job's prompt be copied, see ``jobs.CopyPrompt``.
CopyOf = Callable[[Job, int, Callable[[], bool], Callable[[list[Any] | None], None]], None]


class Running:
    """See the module's text."""

    def __init__(self, longest: int, metrics: Metrics, copy: CopyOf, turns: Turns) -> None:
        """Texts have ``longest`` tokens at the most, where their jobs do not say otherwise."""
        self.queue: deque[Job] = deque()
        #: Bytes that the padded batch may take; set once the memory budget is known.
        self.batch_bytes: int | None = None
        #: What jobs that MLX prefills take their memory of; None where nothing else takes any.
        self.memory: Memory | None = None
        #: Why nothing can be decoded at present; "" while it can.
        self.fault = ""
        #: How fast it is; None where nobody asks.
        self.speed: Speed | None = None
        self.metrics = metrics
        self._longest = longest
        self._copy = copy
        self._turns = turns
        self._batch: Batch | None = None
        self._probing = False

    def __len__(self) -> int:
        """Jobs in the batch."""
        return len(self._batch) if self._batch is not None else 0

    @property
    def batch(self) -> Batch:
        """The batch, once there is a model."""
        assert self._batch is not None
        return self._batch

    def begin(self, batch: Batch) -> None:
        """The model is loaded."""
        self._batch = batch

    @property
    def prefills(self) -> bool:
        """Whether MLX has prompts to prefill in the batch's next step."""
        job = self._next_job()
        return self.batch.prefills > 0 or (job is not None and job.prefills)

    def close(self, code: Code, reason: str) -> None:
        """Nothing is decoded any more; whoever is left fails."""
        batch, self._batch = self._batch, None
        for job in [*(batch.jobs if batch is not None else ()), *self.queue]:
            self.fail(job, code, reason)
        self.queue.clear()
        if batch is not None:
            batch.close()

    def admit(self) -> None:
        """Let jobs join that wait, as many as there is room for. Some copy what an earlier text
        left: where responses are running, one joins at least, and others as long as those may
        wait."""
        began = time.perf_counter()
        while (job := self._next_job()) is not None:
            self.queue.remove(job)
            if job._over:
                continue  # it is among the cancelled ones that come next
            try:
                self._join(job)
            except WireError as error:
                self.fail(job, error.code, error.reason)
            except Exception as error:
                if not job._over:
                    logger.exception("a job could not join the batch")
                self.fail(job, E_INTERNAL, f"joining the batch failed: {error}")
                self.probe()
            seconds = time.perf_counter() - began
            if self.batch.decoding and seconds >= max(self._turns.seconds(JOINS), _JOIN_SECONDS):
                break
        self._turns.took(JOINS, time.perf_counter() - began)

    def step(self) -> None:
        """Decode a token of each, and a chunk of the prompts that MLX prefills."""
        batch = self.batch
        began = time.perf_counter()
        jobs = batch.jobs
        try:
            tokens = batch.step(self._turns.seconds(PROMPTS) / GAP_SECONDS)
        except Exception as error:
            self.restart(error)
            return
        self._turns.took(PROMPTS, batch.prefilled[1])
        if tokens:
            self.metrics.decode_step_seconds.observe(time.perf_counter() - began)
        if self.speed is not None:
            self.speed.stepped(jobs, batch.prefilled, [job for job, _ in tokens])
        wrong = {job: job.fault for job, _ in tokens if job.fault}
        tokens = [(job, token) for job, token in tokens if job not in wrong]
        over = self._deliver(tokens)
        try:
            full = [job for job, _ in tokens if job not in over and not _has_room(job)]
        except Exception as error:
            self.restart(error)
            full = []
        self.remove([*over, *full, *wrong])
        for job, fault in wrong.items():
            self.fail(job, E_UNSUPPORTED, fault)
        for job in full:
            self.fail(job, E_CAPACITY, "the KV memory is full (--kv-memory)")

    def forget(self, cancelled: list[Job]) -> None:
        """Nobody wants these any more."""
        self.queue = deque(job for job in self.queue if not job._over)
        self.remove(cancelled)

    def remove(self, jobs: list[Job]) -> None:
        """Take the jobs out of the batch, and free what they hold."""
        ended = []
        try:
            spare = self.memory.spare_bytes if self.memory is not None else 0
            ended = self.batch.ended(jobs, spare)
        except Exception:
            logger.exception("what texts leave could not be kept")
        try:
            self.batch.remove(jobs)
            while ended:
                row = ended.pop()
                _keep(row.job, row.tokens, row.caches)
        except Exception as error:
            self.restart(error)
        for job in jobs:
            _let_go(job)

    def fail(self, job: Job, code: Code, reason: str) -> None:
        """The job is over, and the batch holds nothing of it."""
        _let_go(job)
        if job._over:
            return
        job._over = True
        try:
            job.sink.failed(job, code, reason)
        except Exception:
            logger.exception("a sink failed")

    def fail_queue(self, code: Code, reason: str) -> None:
        """Those that wait are over."""
        for job in self.queue:
            self.fail(job, code, reason)
        self.queue.clear()

    def restart(self, error: Exception) -> None:
        """Fail what is in the batch, begin another, and see whether that works."""
        logger.error("a decode step failed", exc_info=error)
        jobs = self.batch.jobs
        try:
            self.batch.restart()
        except Exception:
            logger.exception("another batch could not be begun")  # the probe tells
        for job in jobs:
            self.fail(job, E_INTERNAL, f"a decode step failed: {error}")
        self.probe()

    def probe(self) -> None:
        """After a failure: see whether a token can still be decoded. ``fault`` says why not."""
        if self._probing:
            return
        self._probing = True
        sink = _Failure()
        probe = Job([0], Sampling(max_tokens=2, temperature=0.0), sink)
        try:
            self._join(probe)
            while probe in self.batch.jobs:
                self.step()
        except Exception as error:
            sink.reason = str(error) or type(error).__name__
        self._probing = False
        if sink.reason and not self.fault:
            logger.error("decoding fails, no sessions are accepted until it works again")
        elif self.fault and not sink.reason:
            logger.warning("decoding works again")
        self.fault = sink.reason

    # --- inside -----------------------------------------------------------------------------

    def _next_job(self) -> Job | None:
        """The first job that the batch takes, if it fits: nobody overtakes one that does not."""
        batch = self.batch
        job = next((job for job in self.queue if batch.takes(job)), None)
        return job if job is not None and batch.fits(job, self.batch_bytes) else None

    def _join(self, job: Job) -> None:
        batch = self.batch
        job.joined = True
        row = batch.prepare(job)
        if not job.prefills and not len(batch):
            # The generator shows a token once it has issued the step behind it. Nobody else is
            # kept waiting now, so the first one is shown as soon as it is there.
            began = time.perf_counter()
            token = batch.decode_alone(row)
            self.metrics.decode_step_seconds.observe(time.perf_counter() - began)
            if job.fault:
                raise WireError(E_UNSUPPORTED, job.fault)
            if self._deliver([(job, token)]):
                _keep(job, row.held, row.caches)
                row.caches = []
                _let_go(job)
                return
        batch.add(row)

    def _deliver(self, tokens: list[tuple[Job, int]]) -> list[Job]:
        """Hand each job its next token; returns the jobs that are over with it."""
        outputs: dict[int, tuple[Sink, list[Output]]] = {}
        finished = []
        for job, token in tokens:
            assert job.sampler is not None
            output = Output(job, job.outputs, [token])
            job.outputs += 1
            if not job.shown and job.keep is not None:
                job.keep.decoding(job.prompt_token_ids, functools.partial(self._copy, job))
            job.shown = True
            finish = check_stop(
                job.sampling,
                token,
                job.outputs,
                len(job.prompt_token_ids) + job.outputs,
                job.context or self._longest,
            )
            output.finish, output.stop_reason = finish.reason, finish.stop_reason
            if (logprobs := job.sampler.pop_logprobs()) is not None:
                output.logprobs = [logprobs]
            if finish.reason:
                finished.append(job)
                if job.keep is not None:
                    job.keep.leaving()
            if not job._over:
                outputs.setdefault(id(job.sink), (job.sink, []))[1].append(output)
        self.metrics.decoded_tokens.inc(len(tokens))
        for sink, results in outputs.values():
            try:
                sink.decoded(results)
            except Exception:
                logger.exception("a sink failed; its jobs are dropped")
                finished += [output.job for output in results if not output.finish]
        return finished


class _Failure:
    """A ``Sink`` that remembers why its job failed, "" if it did not."""

    def __init__(self) -> None:
        self.reason = ""

    def decoded(self, outputs: list[Output]) -> None:
        """See ``Sink.decoded``."""

    def failed(self, _job: Job, _code: Code, reason: str) -> None:
        self.reason = reason


def _has_room(job: Job) -> bool:
    """Whether the job's cache may hold what it has become; a little is reserved from the start."""
    tokens = len(job.prompt_token_ids) + job.outputs
    return job.reservation is None or job.reservation.grow(tokens)


def _keep(job: Job, tokens: list[int], caches: list[Any]) -> None:
    """Offer what a text leaves to whoever wants to keep it."""
    if job.keep is None:
        return
    try:
        job.keep(tokens, caches)
    except Exception:
        logger.exception("a text's cache could not be kept")


def _let_go(job: Job) -> None:
    """Nothing of the job is in the batch, nor will be: what it held is free."""
    keep, job.keep = job.keep, None
    if keep is not None:
        keep.gone()
    job.sampler = job.build_cache = None
    reservation, job.reservation = job.reservation, None
    if reservation is not None:
        reservation.release()
