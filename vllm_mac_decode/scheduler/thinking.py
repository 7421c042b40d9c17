"""Requests with a ``thinking_token_budget``: what the receiver is told, and what is left to be said
when it gives up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from mlx_receiver.wire.ranges import MAX_INT
from mlx_receiver.wire.sampling import Sampling, Thinking
from mlx_receiver.wire.thinking import rest_of_end
from vllm_mac_decode.scheduler.port import EngineRules

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams


def is_known(params: SamplingParams, engine: EngineRules) -> bool:
    """Whether the receiver can count as vLLM does, and vLLM go on from there.

    Model runner V1 begins a forced end anew in a continuation, unless ``left_over`` completes it;
    those tokens have no log-probabilities.
    """
    rule = engine.thinking
    if rule is None:
        return False
    told = params.logprobs is not None or params.logprob_token_ids
    return rule.runner != "v1" or len(rule.forced) == 1 or not told


def thinking_of(params: SamplingParams, engine: EngineRules) -> Thinking | None:
    """The request's budget in the wire's words; None where it has none."""
    budget = params.thinking_token_budget
    if budget is None or engine.thinking is None:
        return None
    return msgspec.structs.replace(engine.thinking, budget=min(budget, MAX_INT))


def left_over(sampling: Sampling, prompt: list[int], output: list[int]) -> list[int]:
    """The forced tokens that complete the output, as far as it may grow; none that end the text."""
    if sampling.thinking is None:
        return []
    rest = rest_of_end(sampling.thinking, prompt, output)
    if {sampling.eos_token_id, *sampling.stop_token_ids} & {*rest}:
        return []
    return rest[: max(0, sampling.max_tokens - len(output))]
