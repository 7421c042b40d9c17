"""A fresh receiver's first decode steps, taken before anyone waits for them.

A GPU loads or compiles a kernel when it first meets it. The first response would wait for that,
and the first batch again, which on a slow day is longer than vLLM waits for a silent receiver.
"""

from __future__ import annotations

import logging
from typing import Final

from mlx_receiver.engine import Job, Output
from mlx_receiver.model import LoadedModel, ModelSource
from mlx_receiver.wire.messages import E_SHUTDOWN, Sampling

logger = logging.getLogger(__name__)

#: Prompt tokens and sampling of the jobs. They differ in length, so that the batch is padded and
#: needs a mask, and in sampling. The longest is one to which MLX's attention over long caches
#: applies, which takes two passes; it stays alone at the end.
_JOBS: Final = (
    (16, Sampling(max_tokens=4, temperature=0.0)),
    (64, Sampling(max_tokens=5, top_p=0.9, top_k=20)),
    (1280, Sampling(max_tokens=8, temperature=0.0)),
)


def warm_up_jobs(source: ModelSource, loaded: LoadedModel) -> list[Job]:
    """Hand-offs of a few tokens over caches of zeros, whose results nobody gets.

    Raises what allocating their memory raises.
    """
    jobs = []
    for tokens, sampling in _JOBS:
        tokens = max(1, min(tokens, source.max_tokens - sampling.max_tokens))
        buffers = source.adapter.allocate(
            source.signature, loaded.dtype, tokens, sampling.max_tokens
        )
        while buffers.grow():
            pass
        jobs.append(Job([0] * tokens, sampling, _Nobody(), 0, buffers.build))
    return jobs


class _Nobody:
    """See ``engine.Sink``."""

    def decoded(self, outputs: list[Output]) -> None:
        """Nobody asked for them."""

    def failed(self, _job: Job, code: str, reason: str) -> None:
        """Said, and otherwise left to the first response."""
        if code != E_SHUTDOWN:
            logger.warning("warming up failed, the first responses may be slow: %s", reason)
