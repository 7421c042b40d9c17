"""What this vLLM does to the reasoning of requests with a ``thinking_token_budget``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from mlx_receiver.wire.ranges import MAX_MARK_TOKENS
from mlx_receiver.wire.sampling import Thinking

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def thinking(config: VllmConfig) -> Thinking | None:
    """Its rule, with a budget of nothing; None where there is none, or none to be relied upon."""
    marks = getattr(config, "reasoning_config", None)
    if marks is None or not marks.enabled:
        return None
    start: list[int] = marks.reasoning_start_token_ids or []
    forced: list[int] = marks.reasoning_end_token_ids or []
    runner: Literal["v1", "v2"] = "v2" if config.use_v2_model_runner else "v1"
    if runner == "v2":
        # Its releases before vLLM 0.28 take no budgets, and do not have this.
        end = getattr(marks, "natural_reasoning_end_token_ids", None) or []
    elif config.speculative_config is not None or len(start) > 1:
        # V1 has other rules for drafts, and of a longer start it counts some tokens only where that
        # is in the output: a continuation would count others than its request.
        return None
    else:
        end = forced
    if not all(1 <= len(tokens) <= MAX_MARK_TOKENS for tokens in (start, end, forced)):
        return None
    return Thinking(0, start, end, forced, runner)
