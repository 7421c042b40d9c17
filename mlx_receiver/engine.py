"""The decode engine: one thread that owns MLX, a batch that requests join and leave at any step."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from mlx_receiver.metrics import Metrics
from mlx_receiver.model import LoadedModel, ModelSource, Progress, load_model
from mlx_receiver.wire.messages import (
    E_INTERNAL,
    E_SHUTDOWN,
    Code,
    FinishReason,
    Logprobs,
    Sampling,
)

logger = logging.getLogger(__name__)

#: The batch stops a request by itself only here: stopping is decided by ``check_stop``.
_NEVER: Final = 1 << 40

#: Seconds without a job after which freed buffers go back to the system. Until then the next
#: session can have them.
_IDLE_SECONDS: Final = 1.0

BuildCache = Callable[[Any], list[Any]]


@dataclass(slots=True, eq=False)
class Output:
    """What one decode step gave one job.

    ``position`` counts output tokens from 0; vLLM's own first token, where there is one, is 0.
    ``finish`` is "", "stop" or "length".
    """

    job: Job
    position: int
    token_ids: list[int]
    finish: FinishReason = ""
    stop_reason: int | None = None
    logprobs: list[Logprobs] | None = None


class Sink(Protocol):
    """Where a job's results go. Called on the decoding thread; must not block."""

    def decoded(self, outputs: list[Output]) -> None:
        """What one step gave this sink's jobs. A job whose output has a ``finish`` is over."""

    def failed(self, job: Job, code: Code, reason: str) -> None:
        """The job is over without a result."""


@dataclass(slots=True, eq=False)
class Job:
    """A request to decode.

    With ``first_token`` and ``build_cache`` it continues a prompt whose cache exists: that is
    called once, on the decoding thread, with the model's dtype, and returns one cache a layer.
    Without ``build_cache`` MLX prefills the prompt itself, and the first token behind it if that
    was sampled elsewhere.
    """

    prompt_token_ids: list[int]
    sampling: Sampling
    sink: Sink
    first_token: int | None = None
    build_cache: BuildCache | None = None
    _outputs: int = field(default=0, init=False)
    _sampler: Any = field(default=None, init=False)
    _uid: int | None = field(default=None, init=False)
    _over: bool = field(default=False, init=False)


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
        self._dtype = dtype
        self._max_batch = max_batch
        self._metrics = metrics or Metrics()
        self._progress = progress
        self._wants_warm_up = warm_up
        self._condition = threading.Condition()
        self._submitted: deque[Job] = deque()
        self._cancelled: deque[Job] = deque()
        self._stopping = False
        self._loaded_or_failed = threading.Event()
        self._error: Exception | None = None
        self._loaded: LoadedModel | None = None
        self._queue: deque[Job] = deque()
        self._active: dict[int, Job] = {}
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
        """Decode the job as soon as the batch has room."""
        with self._condition:
            if not self._stopping:
                self._submitted.append(job)
                self._condition.notify()
                return
        job.sink.failed(job, E_SHUTDOWN, "the receiver is stopping")

    def cancel(self, job: Job) -> None:
        """Forget the job and free its memory; nothing is reported any more."""
        job._over = True
        with self._condition:
            self._cancelled.append(job)
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
        return len(self._active)

    @property
    def waiting(self) -> int:
        """Jobs that are ready and wait for room in the batch."""
        return len(self._queue) + len(self._submitted)

    # --- the decoding thread -------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._loaded = load_model(self.source, self._dtype, self._progress)
            self._make_generator()
            if self._wants_warm_up:
                self._warm_up()
        except Exception as error:
            self._error = error
            self._loaded = None
            return
        finally:
            self._loaded_or_failed.set()
        while self._take_commands():
            self._admit()
            if self._active:
                self._step()
        for job in [*self._active.values(), *self._queue, *self._submitted]:
            self._fail(job, E_SHUTDOWN, "the receiver is stopping")
        self._generator.close()

    def _warm_up(self) -> None:
        from mlx_receiver.warmup import warm_up_jobs

        assert self._loaded is not None
        metrics, self._metrics = self._metrics, Metrics()  # these are nobody's tokens
        began = time.perf_counter()
        logger.info("warming up: where kernels are compiled, the first time takes longest")
        try:
            self._queue.extend(warm_up_jobs(self.source, self._loaded, self._progress))
            while (self._queue or self._active) and not self._stopping:
                self._admit()
                if self._active:
                    self._step()
        except Exception:
            logger.exception("warming up failed: the first responses may be slow")
        self._metrics = metrics
        # The memory that sessions may reserve is what is free once the model is loaded.
        _release_memory()
        logger.info("warmed up in %.1f s", time.perf_counter() - began)

    def _make_generator(self) -> None:
        import mlx_lm
        from mlx_lm.generate import BatchGenerator

        from mlx_receiver.sampling import greedy

        assert self._loaded is not None
        self._model = Float32Logits(self._loaded.model)
        self._generator = BatchGenerator(
            self._model,
            max_tokens=_NEVER,
            sampler=greedy,
            completion_batch_size=self._max_batch,
            prefill_batch_size=min(8, self._max_batch),
        )
        # Filtering in mlx-lm 0.31 leaves empty processor lists in place, and the next request to
        # join would get another row's: there every request carries a processor.
        version = tuple(int(part) for part in mlx_lm.__version__.split(".")[:2])
        self._least_processors: list[Any] = [_unchanged] if version < (0, 32) else []

    def _take_commands(self) -> bool:
        """Take what was submitted and cancelled; waits while idle. False when stopping."""
        with self._condition:
            while not (
                self._stopping or self._submitted or self._cancelled or self._active or self._queue
            ):
                if not self._condition.wait(_IDLE_SECONDS if self._holds_memory else None):
                    break
            if self._stopping:
                return False
            self._queue.extend(self._submitted)
            self._submitted.clear()
            cancelled = list(self._cancelled)
            self._cancelled.clear()
        if not (self._queue or self._active or cancelled) and self._holds_memory:
            _release_memory()
            self._holds_memory = False
        if cancelled:
            self._queue = deque(job for job in self._queue if not job._over)
            self._remove([job for job in cancelled if job._uid is not None])
        return True

    def _admit(self) -> None:
        while self._queue and len(self._active) < self._max_batch and self._fits(self._queue[0]):
            job = self._queue.popleft()
            if job._over:
                continue
            try:
                self._insert(job)
            except Exception as error:
                if not job._over:
                    logger.exception("a job could not join the batch")
                self._fail(job, E_INTERNAL, f"joining the batch failed: {error}")

    def _fits(self, job: Job) -> bool:
        """Whether the batch, in which every row is as long as the longest, stays in its budget."""
        if not self._active or self.batch_bytes is None:
            return True
        longest = max(
            len(other.prompt_token_ids) + other._outputs for other in [*self._active.values(), job]
        )
        return (len(self._active) + 1) * longest * self._bytes_per_token <= self.batch_bytes

    @property
    def _bytes_per_token(self) -> int:
        from mlx_receiver.wire.frames import ITEMSIZE

        assert self._loaded is not None
        return self.source.signature.kv_bytes_per_token(ITEMSIZE[self._loaded.dtype])

    def _insert(self, job: Job) -> None:
        from mlx_receiver.cache import mlx_dtype
        from mlx_receiver.sampling import RequestSampler

        assert self._loaded is not None
        signature = self.source.signature
        job._outputs = 0 if job.first_token is None else 1
        job._sampler = RequestSampler(
            job.sampling, job.prompt_token_ids, job._outputs, signature.vocab_size
        )
        sampled = [] if job.first_token is None else [job.first_token]
        self._holds_memory = True
        if job.build_cache is not None:
            assert sampled
            caches = job.build_cache(mlx_dtype(self._loaded.dtype))
            job.build_cache = None
            prompt, before = sampled, list(job.prompt_token_ids)
            if not self._active:
                # The generator shows a token once it has issued the step behind it. Nobody else
                # is kept waiting now, so the first one is shown as soon as it is there.
                before += prompt
                prompt = [self._decode_alone(job, before, caches)]
                if self._deliver([(job, prompt[0])]):
                    return
        else:
            caches = self.source.adapter.empty(signature)
            prompt, before = [*job.prompt_token_ids, *sampled], []
        (job._uid,) = self._generator.insert(
            [prompt],
            max_tokens=[_NEVER],
            caches=[caches],
            all_tokens=[before],
            samplers=[job._sampler.sampler],
            logits_processors=[job._sampler.processors or self._least_processors],
        )
        self._active[job._uid] = job

    def _decode_alone(self, job: Job, tokens: list[int], caches: list[Any]) -> int:
        """The token after ``tokens``, of which all but the last are in the caches."""
        import mlx.core as mx
        from mlx_lm.generate import generation_stream

        began = time.perf_counter()
        with mx.stream(generation_stream):
            logits = self._model(mx.array([tokens[-1:]]), cache=caches)[:, -1, :]
            token = int(job._sampler.draw(tokens, logits).item())
        self._metrics.decode_step_seconds.observe(time.perf_counter() - began)
        return token

    def _step(self) -> None:
        began = time.perf_counter()
        try:
            self._compute_tokens()
            _, responses = self._generator.next()
        except Exception as error:
            logger.exception("a decode step failed")
            for job in list(self._active.values()):
                self._fail(job, E_INTERNAL, f"a decode step failed: {error}")
            self._active.clear()
            self._make_generator()
            return
        if responses:
            self._metrics.decode_step_seconds.observe(time.perf_counter() - began)
        self._remove(self._deliver([(self._active[r.uid], r.token) for r in responses]))

    def _deliver(self, tokens: list[tuple[Job, int]]) -> list[Job]:
        """Hand each job its next token; returns the jobs that are over with it."""
        from mlx_receiver.wire.stopping import check_stop

        outputs: dict[int, tuple[Sink, list[Output]]] = {}
        finished = []
        for job, token in tokens:
            output = Output(job, job._outputs, [token])
            job._outputs += 1
            finish = check_stop(
                job.sampling,
                token,
                job._outputs,
                len(job.prompt_token_ids) + job._outputs,
                self.source.max_tokens,
            )
            output.finish, output.stop_reason = finish.reason, finish.stop_reason
            if (logprobs := job._sampler.pop_logprobs()) is not None:
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

    def _remove(self, jobs: list[Job]) -> None:
        leaving = [job._uid for job in jobs if job._uid in self._active]
        if not leaving:
            return
        import mlx.core as mx
        from mlx_lm.generate import generation_stream

        with mx.stream(generation_stream):
            self._generator.remove(leaving)
        for uid in leaving:
            if uid is not None:
                del self._active[uid]

    def _compute_tokens(self) -> None:
        """Let the tokens of the step that is under way be ready when it ends.

        Joins and leavings concatenate and select them lazily. Evaluated with the step that comes
        next, they would make every running response wait for that step, too.
        """
        import mlx.core as mx

        batch = self._generator._generation_batch
        if len(batch):
            mx.async_eval(batch._next_tokens)

    def _fail(self, job: Job, code: Code, reason: str) -> None:
        if job._over:
            return
        job._over = True
        try:
            job.sink.failed(job, code, reason)
        except Exception:
            logger.exception("a sink failed")


class Float32Logits:
    """The model with float32 logits, as vLLM samples from them.

    ``BatchGenerator`` normalises logits in their own dtype; in bfloat16 that rounds different
    logits to equal ones.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.layers = model.layers

    def __call__(self, inputs: Any, cache: Any = None) -> Any:
        import mlx.core as mx

        return self._model(inputs, cache=cache).astype(mx.float32)


def _release_memory() -> None:
    """Give freed buffers back to the system; MLX and glibc would keep them."""
    import mlx.core as mx

    mx.clear_cache()
    if sys.platform == "linux":
        # On a Mac, and on a GPU, MLX does not use malloc for its arrays.
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def _unchanged(_context: Any, logits: Any) -> Any:
    return logits
