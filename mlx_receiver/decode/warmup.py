"""A fresh receiver's first decode steps, taken before anyone waits for them.

A GPU loads or compiles a kernel when it first meets it. MLX's CUDA build takes 3 to 17 s for those
of one kind of sampling or of joining, and vLLM waits 2 s for a silent receiver; the compiled ones
stay in the temporary folder, so that the next start is quick.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from mlx_receiver.decode.device import release_memory
from mlx_receiver.decode.jobs import Job, Output
from mlx_receiver.decode.model import LoadedModel, ModelError, ModelSource, Progress
from mlx_receiver.metrics import Metrics
from mlx_receiver.wire.messages import E_SHUTDOWN, Code
from mlx_receiver.wire.sampling import Sampling

if TYPE_CHECKING:
    from mlx_receiver.decode.running import Running

logger = logging.getLogger(__name__)

#: Prompt tokens and sampling of the jobs. They differ in length, so that the batch is padded and
#: needs a mask, and together they sample in every way there is. The longest is one to which MLX's
#: attention over long caches applies, which takes two passes; it stays alone at the end.
WARM_UP_JOBS: Final = (
    (16, Sampling(max_tokens=4, temperature=0.0)),
    (64, Sampling(max_tokens=5, top_p=0.9, top_k=20)),
    (
        128,
        Sampling(
            max_tokens=6, min_tokens=6, stop_token_ids=[1], top_k=20, min_p=0.01, seed=1,
            repetition_penalty=1.1, presence_penalty=0.1, frequency_penalty=0.1,
            logit_bias={0: 1.0}, bad_words_token_ids=[[0], [0, 1]], logprobs=2,
        ),
    ),
    (1280, Sampling(max_tokens=8, temperature=0.0)),
)  # fmt: skip


def warm_up(
    running: Running,
    source: ModelSource,
    loaded: LoadedModel,
    progress: Progress | None,
    stopping: Callable[[], bool],
) -> None:
    """Raises ModelError when the model cannot be decoded with."""
    metrics, running.metrics = running.metrics, Metrics()  # these are nobody's tokens
    began = time.perf_counter()
    logger.info("warming up: where kernels are compiled, the first time takes longest")
    failures: list[str] = []
    try:
        running.batch.check_logits()
        running.queue.extend(warm_up_jobs(source, loaded, progress, failures.append))
        while (running.queue or len(running)) and not stopping():
            running.admit()
            if len(running):
                running.step()
    except Exception as error:
        logger.debug("warming up failed", exc_info=True)
        failures.append(str(error) or type(error).__name__)
    if failures:
        running.batch.close()
        raise ModelError(
            f"{source.name} cannot be decoded with on this machine: {failures[0]}. Free "
            "memory, try another --dtype, or download the model again"
        )
    running.metrics = metrics
    # The memory that sessions may reserve is what is free once the model is loaded.
    release_memory()
    logger.info("warmed up in %.1f s", time.perf_counter() - began)


def warm_up_jobs(
    source: ModelSource,
    loaded: LoadedModel,
    progress: Progress | None,
    failed: Callable[[str], None],
) -> list[Job]:
    """Hand-offs of a few tokens over caches of zeros, whose results nobody gets; ``failed`` is told
    why one of them failed.

    Raises what allocating their memory raises.
    """
    if loaded.local:
        return []
    total = sum(sampling.max_tokens - 1 for _, sampling in WARM_UP_JOBS)
    sink = _Discard(total, progress, failed)
    jobs = []
    for tokens, sampling in WARM_UP_JOBS:
        tokens = max(1, min(tokens, source.max_tokens - sampling.max_tokens))
        buffers = loaded.cache.allocate(loaded.cache.layout, tokens, sampling.max_tokens)
        while buffers.grow():
            pass
        jobs.append(Job([0] * tokens, sampling, sink, 0, buffers.build))
    return jobs


class _Discard:
    """A ``Sink`` that counts tokens and keeps none."""

    def __init__(
        self, total: int, progress: Progress | None, failed: Callable[[str], None]
    ) -> None:
        self._done, self._total = 0, total
        self._failed = failed
        self._progress = progress

    def decoded(self, outputs: list[Output]) -> None:
        self._done += len(outputs)
        if self._progress is not None:
            self._progress("Warming up", self._done, self._total)

    def failed(self, _job: Job, code: Code, reason: str) -> None:
        if code != E_SHUTDOWN:
            self._failed(reason)
