"""Which requests the receiver may continue, and why the others decode locally."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlx_receiver.wire.sampling import Sampling
from vllm_mac_decode.scheduler import order, thinking
from vllm_mac_decode.scheduler.grammars import grammar_of, is_known
from vllm_mac_decode.scheduler.port import EngineRules
from vllm_mac_decode.settings import Settings

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

#: Most alternatives per token for which the receiver computes log-probabilities.
MAX_LOGPROBS = 20

_NO_RULES = EngineRules()


def is_routed(request: Request) -> bool:
    """Whether a router asks for the prefill only, and another server will decode."""
    params = request.kv_transfer_params
    return bool(params and params.get("do_remote_decode")) and request.max_tokens == 1


def local_reason(
    request: Request, settings: Settings, engine: EngineRules = _NO_RULES
) -> str | None:
    """Why this request must decode locally, as a metric label; None when it may be handed off."""
    params = request.sampling_params
    if params is None or request.pooling_params is not None:
        return "pooling"
    if request.lora_request is not None:
        return "lora"
    if request.mm_features:
        return "multimodal"
    if request.prompt_token_ids is None or request.prompt_embeds is not None:
        return "prompt_embeds"
    if request.resumable:
        return "streaming_input"
    routed = is_routed(request)
    if request.kv_transfer_params and not routed:
        return "router"
    if len(request.prompt_token_ids) < settings.min_prompt_tokens:
        return "short_prompt"
    if routed:
        return None  # whoever decodes has the sampling parameters
    if request.max_tokens < settings.min_output_tokens:
        return "short_output"
    return engine.everything or _sampling_reason(params, engine)


def _sampling_reason(params: SamplingParams, engine: EngineRules) -> str | None:
    structured = params.structured_outputs
    if structured is not None and (params.min_tokens > 1 or not is_known(structured)):
        # A text that is complete before its least length has no next token; releases differ in what
        # becomes of it.
        return "structured_output"
    if (params.logprobs or 0) > MAX_LOGPROBS or params.logprobs == -1:
        return "logprobs"
    told = params.logprobs is not None or params.logprob_token_ids
    if told and not engine.raw_logprobs:
        return "logprobs_mode"
    if len(params.logprob_token_ids or ()) > MAX_LOGPROBS:
        return "logprob_token_ids"
    if params.thinking_token_budget is not None and not thinking.is_known(params, engine):
        return "thinking_budget"
    if params.repetition_detection is not None:
        return "repetition_detection"
    if order.others(params.extra_args):
        return "extra_args"  # addressed to custom logits processors or other plugins
    # ``watermarking`` says nothing by itself (vLLM 0.30 and 0.31 set it in every request): what
    # counts is whether the engine has a watermark. The other one is there from vLLM 0.29 on.
    if getattr(params, "trace_decode_token_ids", None):
        return "trace_decode"
    return None


def sampling(request: Request, max_tokens: int, engine: EngineRules = _NO_RULES) -> Sampling:
    """The request's sampling parameters for the receiver; ``max_tokens`` is the client's."""
    params = request.sampling_params
    assert params is not None
    structured = params.structured_outputs
    # Among them is the end of text that ``ignore_eos`` lets pass.
    ends = params.all_stop_token_ids if params.min_tokens or structured is not None else ()
    named = list(params.logprob_token_ids or ())
    # Each once: the receiver takes no more than its vocabulary has.
    allowed = params.allowed_token_ids and list(dict.fromkeys(params.allowed_token_ids))
    return Sampling(
        max_tokens=max_tokens,
        min_tokens=params.min_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=max(params.top_k, 0),
        min_p=params.min_p,
        seed=params.seed,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=params.logit_bias,
        allowed_token_ids=allowed,
        bad_words_token_ids=params.bad_words_token_ids,
        eos_token_id=params.eos_token_id,
        stop_token_ids=sorted(params.stop_token_ids or ()),
        # vLLM tells of the named ones, whatever number was asked for.
        logprobs=len(named) if named else params.logprobs,
        logprob_token_ids=named,
        end_token_ids=sorted(ends),
        grammar=grammar_of(structured, engine) if structured is not None else None,
        thinking=thinking.thinking_of(params, engine),
    )
