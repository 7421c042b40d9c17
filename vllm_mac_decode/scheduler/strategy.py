"""What can be done with a request that a receiver may decode; which of it is done, is planned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mlx_receiver.planning.cost import Strategy
from mlx_receiver.wire.layout import CacheLayout
from vllm_mac_decode.scheduler.eligibility import is_routed

if TYPE_CHECKING:
    from vllm.v1.request import Request

#: What vLLM computes of a prompt beside its KV; the second one is there in some releases only.
_OF_PROMPTS: Final = ("prompt_logprobs", "prompt_logprob_token_ids")


def possible(request: Request, layout: CacheLayout, draining: bool) -> set[Strategy]:
    """Who can do what. A router's prefill is split between whom it says. Only a cache that keeps
    every token can be computed from the front while it comes from the end. What vLLM holds back,
    while it is paused say, waits in its own queue (``draining``)."""
    if is_routed(request):
        return {Strategy.SPLIT}
    found = {Strategy.VLLM, Strategy.SPLIT}
    if layout.every_token:
        found.add(Strategy.MEET)
    if takes_whole(request) and not draining:
        found.add(Strategy.MAC)
    return found


def takes_whole(request: Request) -> bool:
    """Whether the receiver can do all of a request that it may decode. A router's prefill, and what
    is to be told about the prompt, are vLLM's."""
    params = request.sampling_params
    told = any(getattr(params, name, None) is not None for name in _OF_PROMPTS)
    return not told and not is_routed(request)
