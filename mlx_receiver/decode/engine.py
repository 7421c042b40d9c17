"""The decode engine: one thread that owns MLX, a batch that requests join and leave at any step."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import sys
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Final

from mlx_receiver.caches.memory import Budget
from mlx_receiver.decode.comparisons import Comparisons
from mlx_receiver.decode.jobs import Job, Output, Proof, Sink
from mlx_receiver.decode.model import LoadedModel, ModelError, ModelSource, Progress, load_model
from mlx_receiver.metrics import Metrics
from mlx_receiver.wire.messages import (
    E_CAPACITY,
    E_INTERNAL,
    E_SHUTDOWN,
    E_UNSUPPORTED,
    Code,
    Sampling,
    WireError,
)

if TYPE_CHECKING:
    from mlx_receiver.decode.batch import Batch

__all__ = ["DecodeEngine", "Job", "Output", "Proof", "Sink"]

logger = logging.getLogger(__name__)

#: Seconds between two attempts to decode again after one has failed.
_PROBE_SECONDS: Final = 1.0

#: Seconds without a job after which freed buffers go back to the system. Until then the next
#: session can have them.
_IDLE_SECONDS: Final = 1.0


class DecodeEngine:
    """Loads the model and decodes. Public methods may be called from any thread."""

    def __init__(
        self,
        source: ModelSource,
        *,
        dtype: str = "auto",
        max_batch: int = 32,
        metrics: Metrics | None = None,
        progress: Progress | None = None,
        warm_up: bool = False,
    ) -> None:
        self.source = source
        #: Bytes that the padded batch may take; set once the memory budget is known.
        self.batch_bytes: int | None = None
        #: Of which local jobs take their memory; None where nothing else takes any.
        self.budget: Budget | None = None
        #: Why nothing can be decoded at present; "" while it can.
        self.fault = ""
        self._dtype = dtype
        self._max_batch = max_batch
        self._metrics = metrics or Metrics()
        self._progress = progress
        self._wants_warm_up = warm_up
        self._condition = threading.Condition()
        self._submitted: deque[Job] = deque()
        self._cancelled: deque[Job] = deque()
        self._proofs = Comparisons(source)
        self._stopping = False
        self._loaded_or_failed = threading.Event()
        self._error: Exception | None = None
        self._loaded: LoadedModel | None = None
        self._queue: deque[Job] = deque()
        self._batch: Batch | None = None
        self._probing = False
        self._holds_memory = True
        self._thread = threading.Thread(target=self._run, name="mlx-decode", daemon=True)

    def start(self) -> None:
        """Start loading the model; returns at once."""
        self._thread.start()

    def wait_loaded(self, timeout: float | None = None) -> LoadedModel | None:
        """The loaded model, or None after ``timeout`` seconds. Raises what loading raised."""
        if not self._loaded_or_failed.wait(timeout):
            return None
        if self._error is not None:
            raise self._error
        return self._loaded

    def submit(self, job: Job) -> None:
        """Decode the job as soon as the batch has room; one that cannot be fails."""
        try:
            self._check(job)
            with self._condition:
                if not self._stopping:
                    self._submitted.append(job)
                    self._condition.notify()
                    return
            raise WireError(E_SHUTDOWN, "the receiver is stopping")
        except WireError as error:
            self._fail(job, error.code, error.reason)

    def _check(self, job: Job) -> None:
        """Raise WireError for a job that must not reach MLX, or has no memory."""
        vocab = self.source.signature.vocab_size
        if job.first_token is not None and not 0 <= job.first_token < vocab:
            raise WireError(E_UNSUPPORTED, f"first token {job.first_token} is not below {vocab}")
        if self.fault:
            raise WireError(E_INTERNAL, f"this receiver cannot decode: {self.fault}")
        if job.reservation is None and self.budget is not None:
            job.reservation = self.budget.reserve(
                len(job.prompt_token_ids), job.sampling.max_tokens
            )

    def cancel(self, job: Job) -> None:
        """Forget the job and free its memory; nothing is reported any more."""
        job._over = True
        with self._condition:
            self._cancelled.append(job)
            self._condition.notify()

    def prove(self, proof: Proof) -> None:
        """Compare caches as soon as nothing is decoded."""
        self._proofs.add(proof)
        with self._condition:
            self._condition.notify()

    def stop(self, timeout: float = 2.0) -> None:
        """End the thread after the current step. Jobs that are left fail with ``shutdown``."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)

    @property
    def loaded(self) -> LoadedModel | None:
        """The model; None until it is ready to decode."""
        return self._loaded if self._loaded_or_failed.is_set() else None

    @property
    def decoding(self) -> int:
        """Jobs in the batch."""
        return len(self._batch) if self._batch is not None else 0

    @property
    def waiting(self) -> int:
        """Jobs that are ready and wait for room in the batch."""
        return len(self._queue) + len(self._submitted)

    # --- the decoding thread -------------------------------------------------------------------

    def _run(self) -> None:
        try:
            from mlx_receiver.decode.batch import Batch

            self._loaded = load_model(self.source, self._dtype, self._progress)
            self._batch = Batch(self.source, self._loaded, self._max_batch)
            if self._wants_warm_up:
                self._warm_up(self._batch, self._loaded)
        except Exception as error:
            self._error = error
            self._loaded = None
            return
        finally:
            self._loaded_or_failed.set()
        batch = self._batch
        while self._take_commands(batch):
            if self.fault:
                self._recover(batch)
            self._proofs.drop_unwanted()
            self._admit(batch)
            if len(batch):
                self._step(batch)
            elif self._proofs and not self._queue:
                self._holds_memory = True
                self._proofs.make_one(self._loaded)
        self._proofs.end()
        for job in [*batch.jobs, *self._queue, *self._submitted]:
            self._fail(job, E_SHUTDOWN, "the receiver is stopping")
        batch.close()
        # Another model may be loaded next, in the same process.
        self._loaded = self._batch = None
        del batch
        _release_memory()

    def _warm_up(self, batch: Batch, loaded: LoadedModel) -> None:
        """Raises ModelError when the model cannot be decoded with."""
        from mlx_receiver.decode.warmup import warm_up_jobs

        metrics, self._metrics = self._metrics, Metrics()  # these are nobody's tokens
        began = time.perf_counter()
        logger.info("warming up: where kernels are compiled, the first time takes longest")
        failures: list[str] = []
        try:
            batch.check_logits()
            jobs = warm_up_jobs(self.source, loaded, self._progress, failures.append)
            self._queue.extend(jobs)
            while (self._queue or len(batch)) and not self._stopping:
                self._admit(batch)
                if len(batch):
                    self._step(batch)
        except Exception as error:
            logger.debug("warming up failed", exc_info=True)
            failures.append(str(error) or type(error).__name__)
        if failures:
            batch.close()
            raise ModelError(
                f"{self.source.name} cannot be decoded with on this machine: {failures[0]}. Free "
                "memory, try another --dtype, or download the model again"
            )
        self._metrics = metrics
        # The memory that sessions may reserve is what is free once the model is loaded.
        _release_memory()
        logger.info("warmed up in %.1f s", time.perf_counter() - began)

    def _take_commands(self, batch: Batch) -> bool:
        """Take what was submitted and cancelled; waits while idle. False when stopping."""
        with self._condition:
            while not (
                self._stopping
                or self._submitted
                or self._cancelled
                or self._proofs
                or self._queue
                or len(batch)
                or self.fault
            ):
                if not self._condition.wait(_IDLE_SECONDS if self._holds_memory else None):
                    break
            if self._stopping:
                return False
            self._queue.extend(self._submitted)
            self._submitted.clear()
            cancelled = list(self._cancelled)
            self._cancelled.clear()
        if not (self._queue or len(batch) or cancelled or self._proofs) and self._holds_memory:
            _release_memory()
            self._holds_memory = False
        if cancelled:
            self._queue = deque(job for job in self._queue if not job._over)
            self._remove(batch, cancelled)
        return True

    def _admit(self, batch: Batch) -> None:
        while (job := self._next_job(batch)) is not None:
            self._queue.remove(job)
            if job._over:
                continue  # it is among the cancelled ones that come next
            try:
                self._join(batch, job)
            except Exception as error:
                if not job._over:
                    logger.exception("a job could not join the batch")
                self._fail(job, E_INTERNAL, f"joining the batch failed: {error}")
                self._probe(batch)

    def _next_job(self, batch: Batch) -> Job | None:
        """The first job that the batch takes, if it fits: nobody overtakes one that does not."""
        job = next((job for job in self._queue if batch.takes(job)), None)
        return job if job is not None and batch.fits(job, self.batch_bytes) else None

    def _join(self, batch: Batch, job: Job) -> None:
        self._holds_memory = True
        job.joined = True
        row = batch.prepare(job)
        if not job.prefills and not len(batch):
            # The generator shows a token once it has issued the step behind it. Nobody else is
            # kept waiting now, so the first one is shown as soon as it is there.
            began = time.perf_counter()
            token = batch.decode_alone(row)
            self._metrics.decode_step_seconds.observe(time.perf_counter() - began)
            if self._deliver([(job, token)]):
                row.caches.clear()
                _let_go(job)
                return
        batch.add(row)

    def _step(self, batch: Batch) -> None:
        began = time.perf_counter()
        try:
            tokens = batch.step()
        except Exception as error:
            self._restart(batch, error)
            return
        if tokens:
            self._metrics.decode_step_seconds.observe(time.perf_counter() - began)
        over = self._deliver(tokens)
        try:
            full = [job for job, _ in tokens if job not in over and not _has_room(job)]
        except Exception as error:
            self._restart(batch, error)
            full = []
        self._remove(batch, [*over, *full])
        for job in full:
            self._fail(job, E_CAPACITY, "the KV memory is full (--kv-memory)")

    def _remove(self, batch: Batch, jobs: list[Job]) -> None:
        """Take the jobs out of the batch, and free what they hold."""
        try:
            batch.remove(jobs)
        except Exception as error:
            self._restart(batch, error)
        for job in jobs:
            _let_go(job)

    def _restart(self, batch: Batch, error: Exception) -> None:
        """Fail what is in the batch, begin another, and see whether that works."""
        logger.error("a decode step failed", exc_info=error)
        for job in batch.restart():
            self._fail(job, E_INTERNAL, f"a decode step failed: {error}")
        self._probe(batch)

    def _probe(self, batch: Batch) -> None:
        """After a failure: see whether a token can still be decoded. ``fault`` says why not."""
        if self._probing:
            return
        self._probing = True
        sink = _Failure()
        probe = Job([0], Sampling(max_tokens=2, temperature=0.0), sink)
        try:
            self._join(batch, probe)
            while probe in batch.jobs:
                self._step(batch)
        except Exception as error:
            sink.reason = str(error) or type(error).__name__
        self._probing = False
        if sink.reason and not self.fault:
            logger.error("decoding fails, no sessions are accepted until it works again")
        elif self.fault and not sink.reason:
            logger.warning("decoding works again")
        self.fault = sink.reason

    def _recover(self, batch: Batch) -> None:
        """Fail what waits for a batch that cannot decode, and try again in a while."""
        for job in self._queue:
            self._fail(job, E_INTERNAL, f"this receiver cannot decode: {self.fault}")
        self._queue.clear()
        with self._condition:
            if not (self._stopping or len(batch)):
                self._condition.wait(_PROBE_SECONDS)
        self._probe(batch)

    def _deliver(self, tokens: list[tuple[Job, int]]) -> list[Job]:
        """Hand each job its next token; returns the jobs that are over with it."""
        from mlx_receiver.wire.stopping import check_stop

        outputs: dict[int, tuple[Sink, list[Output]]] = {}
        finished = []
        for job, token in tokens:
            assert job.sampler is not None
            output = Output(job, job.outputs, [token])
            job.outputs += 1
            job.shown = True
            finish = check_stop(
                job.sampling,
                token,
                job.outputs,
                len(job.prompt_token_ids) + job.outputs,
                job.context or self.source.max_tokens,
            )
            output.finish, output.stop_reason = finish.reason, finish.stop_reason
            if (logprobs := job.sampler.pop_logprobs()) is not None:
                output.logprobs = [logprobs]
            if finish.reason:
                finished.append(job)
            if not job._over:
                outputs.setdefault(id(job.sink), (job.sink, []))[1].append(output)
        self._metrics.decoded_tokens.inc(len(tokens))
        for sink, results in outputs.values():
            try:
                sink.decoded(results)
            except Exception:
                logger.exception("a sink failed; its jobs are dropped")
                finished += [output.job for output in results if not output.finish]
        return finished

    def _fail(self, job: Job, code: Code, reason: str) -> None:
        """The job is over, and the batch holds nothing of it."""
        _let_go(job)
        if job._over:
            return
        job._over = True
        try:
            job.sink.failed(job, code, reason)
        except Exception:
            logger.exception("a sink failed")


class _Failure:
    """A sink that remembers why its job failed, "" if it did not."""

    def __init__(self) -> None:
        self.reason = ""

    def decoded(self, outputs: list[Output]) -> None:
        """See ``Sink.decoded``."""

    def failed(self, _job: Job, _code: Code, reason: str) -> None:
        """See ``Sink.failed``."""
        self.reason = reason


def _has_room(job: Job) -> bool:
    """Whether the job's cache may hold what it has become; a little is reserved from the start."""
    tokens = len(job.prompt_token_ids) + job.outputs
    return job.reservation is None or job.reservation.grow(tokens)


def _let_go(job: Job) -> None:
    """Nothing of the job is in the batch, nor will be: what it held is free."""
    job.sampler = job.build_cache = None
    reservation, job.reservation = job.reservation, None
    if reservation is not None:
        reservation.release()


def _release_memory() -> None:
    """Give freed buffers back to the system; MLX and glibc would keep them."""
    import mlx.core as mx

    mx.clear_cache()
    if sys.platform == "linux":
        # On a Mac, and on a GPU, MLX does not use malloc for its arrays.
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
