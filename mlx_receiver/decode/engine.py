"""The decode engine: one thread that owns MLX, a batch that requests join and leave at any step."""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Final

from mlx_receiver.decode.copies import Copy, copy_now
from mlx_receiver.decode.device import release_memory
from mlx_receiver.decode.fronts import Front
from mlx_receiver.decode.gap import Gap
from mlx_receiver.decode.grammar.compiling import Compiled, Grammars
from mlx_receiver.decode.jobs import Job, Memory, Proof
from mlx_receiver.decode.model import LoadedModel, ModelSource, Progress, load_model
from mlx_receiver.decode.running import Running
from mlx_receiver.metrics import Metrics
from mlx_receiver.wire.messages import E_INTERNAL, E_SHUTDOWN, E_UNSUPPORTED, WireError

if TYPE_CHECKING:
    from mlx_receiver.decode.speed import Speed

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
        self.grammars = Grammars(source)
        self._dtype = dtype
        self._max_batch = max_batch
        self._progress = progress
        self._wants_warm_up = warm_up
        self._condition = threading.Condition()
        self._submitted: deque[Job] = deque()
        self._cancelled: deque[Job] = deque()
        self._gap = Gap(source)
        self._running = Running(
            source.max_tokens, metrics or Metrics(), self._copy, self._gap.turns
        )
        self._stopping = False
        self._loaded_or_failed = threading.Event()
        self._error: Exception | None = None
        self._loaded: LoadedModel | None = None
        self._holds_memory = True
        self._thread = threading.Thread(target=self._run, name="mlx-decode", daemon=True)

    @property
    def fault(self) -> str:
        """Why nothing can be decoded at present; "" while it can."""
        return self._running.fault

    def use(self, memory: Memory) -> None:
        """Jobs that MLX prefills take their memory of it; before the first of them."""
        self._running.memory = memory

    def limit_batch(self, nbytes: int) -> None:
        """Bytes that the padded batch may take, once the memory budget is known."""
        self._running.batch_bytes = nbytes

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
        except WireError as error:
            self._running.fail(job, error.code, error.reason)
            return
        if job.sampling.grammar is None:
            self._enqueue(job)
            return
        compiled = job.compiling or self.grammars.compile(job.sampling.grammar)
        job.compiling = None
        compiled.add_done_callback(functools.partial(self._compiled, job))

    def _compiled(self, job: Job, future: Future[Compiled]) -> None:
        """The job's grammar is ready, or will not be; on the thread that compiles."""
        if future.cancelled():
            self._running.fail(job, E_SHUTDOWN, "the receiver is stopping")
        elif (error := future.exception()) is not None:
            # Not raised again: an exception keeps alive what raised it.
            if isinstance(error, WireError):
                self._running.fail(job, error.code, error.reason)
            else:
                self._running.fail(job, E_INTERNAL, str(error))
        else:
            job.grammar = future.result()
            self._enqueue(job)

    def _enqueue(self, job: Job) -> None:
        with self._condition:
            if job._over:
                return  # who cancelled it frees what it holds
            if not self._stopping:
                self._submitted.append(job)
                self._condition.notify()
                return
        self._running.fail(job, E_SHUTDOWN, "the receiver is stopping")

    def _check(self, job: Job) -> None:
        """Raise WireError for a job that must not reach MLX, or has no memory."""
        vocab = self.source.signature.vocab_size
        if job.first_token is not None and not 0 <= job.first_token < vocab:
            raise WireError(E_UNSUPPORTED, f"first token {job.first_token} is not below {vocab}")
        if self.fault:
            raise WireError(E_INTERNAL, f"this receiver cannot decode: {self.fault}")
        memory = self._running.memory
        if job.reservation is None and memory is not None:
            memory.begin(job)

    def cancel(self, job: Job) -> None:
        """Forget the job and free its memory; nothing is reported any more."""
        job._over = True
        if job.joined and (keep := job.keep) is not None:
            keep.leaving()
        with self._condition:
            self._cancelled.append(job)
            self._condition.notify()

    def prove(self, proof: Proof) -> None:
        """Compare caches as soon as nothing is decoded."""
        self._gap.proofs.add(proof)
        self._wake()

    def observe(self, speed: Speed) -> None:
        """Measure, while nothing is decoded, what it wants measured, and tell it of every step."""
        self._gap.speed = self._running.speed = speed
        self._wake()

    def compute(self, front: Front) -> None:
        """Compute a prompt's KV from the front, between the steps of what is decoded."""
        self._gap.fronts.add(front)
        self._wake()

    def _wake(self) -> None:
        with self._condition:
            self._condition.notify()

    def stop(self, timeout: float = 2.0) -> None:
        """End the thread after the current step. Jobs that are left fail with ``shutdown``."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        self.grammars.close()
        if self._thread.is_alive():
            self._thread.join(timeout)

    @property
    def loaded(self) -> LoadedModel | None:
        """The model; None until it is ready to decode."""
        return self._loaded if self._loaded_or_failed.is_set() else None

    @property
    def decoding(self) -> int:
        """Jobs in the batch."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Jobs that are ready and wait for room in the batch."""
        return len(self._running.queue) + len(self._submitted)

    # --- the decoding thread -------------------------------------------------------------------

    def _run(self) -> None:
        running, gap = self._running, self._gap
        try:
            from mlx_receiver.decode.batch import Batch

            self._loaded = load_model(self.source, self._dtype, self._progress)
            running.begin(Batch(self.source, self._loaded, self._max_batch))
            if self._wants_warm_up:
                self._warm_up(self._loaded)
        except Exception as error:
            self._error = error
            self._loaded = None
            return
        finally:
            self._loaded_or_failed.set()
        while self._take_commands():
            try:
                self._work(self._loaded)
            except Exception as error:
                running.restart(error)
                self._pause()
        gap.end()
        running.close(E_SHUTDOWN, "the receiver is stopping")
        for job in self._submitted:
            running.fail(job, E_SHUTDOWN, "the receiver is stopping")
        # Another model may be loaded next, in the same process.
        self._loaded = running.speed = None
        release_memory()

    def _work(self, loaded: LoadedModel) -> None:
        """A step, and what is done until the next one."""
        running, gap = self._running, self._gap
        if running.fault:
            self._recover()
        gap.begin(bool(running.queue or len(running)))
        running.admit()
        if len(running):
            running.step()
        elif not running.queue:
            gap.rest(loaded, bool(running.fault))
        gap.work(loaded, running.batch, running.prefills, bool(running.fault))

    def _warm_up(self, loaded: LoadedModel) -> None:
        """Raises ModelError when the model cannot be decoded with."""
        from mlx_receiver.decode.warmup import warm_up

        warm_up(self._running, self.source, loaded, self._progress, lambda: self._stopping)

    def _copy(
        self,
        job: Job,
        tokens: int,
        wanted: Callable[[], bool],
        done: Callable[[list[Any] | None], None],
    ) -> None:
        """See ``jobs.CopyPrompt``. On the decoding thread it is done at once, or not."""
        copy = Copy(job, tokens, wanted, done)
        if threading.current_thread() is self._thread:
            copy_now(copy, self._running.batch)
            return
        self._gap.copies.add(copy)
        self._wake()

    def _take_commands(self) -> bool:
        """Take what was submitted and cancelled; waits while idle. False when stopping."""
        running, gap = self._running, self._gap
        with self._condition:
            while not (
                self._stopping
                or self._submitted
                or self._cancelled
                or gap
                or running.queue
                or len(running)
                or running.fault
                or gap.measures
            ):
                later = self._holds_memory or gap.measures_later
                if not self._condition.wait(_IDLE_SECONDS if later else gap.rests):
                    break
            if self._stopping:
                return False
            running.queue.extend(self._submitted)
            self._submitted.clear()
            cancelled = list(self._cancelled)
            self._cancelled.clear()
        if cancelled or running.queue or len(running) or gap or gap.measures:
            self._holds_memory = True
        elif self._holds_memory:
            release_memory()
            self._holds_memory = False
        if cancelled:
            running.forget(cancelled)
        return True

    def _recover(self) -> None:
        """Fail what waits for a batch that cannot decode, and try again in a while."""
        running = self._running
        self._holds_memory = True
        running.fail_queue(E_INTERNAL, f"this receiver cannot decode: {running.fault}")
        if not len(running):
            self._pause()
        running.probe()

    def _pause(self) -> None:
        """After a failure: the next one is not to follow at once."""
        with self._condition:
            if not self._stopping:
                self._condition.wait(_PROBE_SECONDS)
