"""When a text ends: the rule by which the receiver ends it, and vLLM's side expects it to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mlx_receiver.wire.messages import FinishReason
from mlx_receiver.wire.sampling import Sampling


@dataclass(frozen=True, slots=True)
class Finish:
    """Why a text ends; ``reason`` is "" while it goes on."""

    reason: FinishReason = ""
    stop_reason: int | None = None


#: Of most tokens.
GOES_ON: Final = Finish()
_END: Final = Finish("stop")
_FULL: Final = Finish("length")


def check_stop(
    sampling: Sampling, token: int, output_tokens: int, all_tokens: int, max_tokens: int
) -> Finish:
    """Whether the text ends with ``token``, as ``vllm/v1/core/sched/utils.py`` decides it.

    ``output_tokens`` and ``all_tokens`` (prompt included) count ``token``; ``max_tokens`` is the
    longest prompt and output together.
    """
    if token == sampling.eos_token_id:
        return _END
    if token in sampling.stop_token_ids:
        return Finish("stop", token)
    if all_tokens >= max_tokens or output_tokens >= sampling.max_tokens:
        return _FULL
    return GOES_ON
