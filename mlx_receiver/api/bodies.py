"""Request bodies. Fields that are not listed are ignored: clients and routers send many."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from mlx_receiver.api.errors import bad_request


class StreamOptions(msgspec.Struct):
    """OpenAI's ``stream_options``; ``continuous_usage_stats`` is vLLM's."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class SamplingBody(msgspec.Struct, kw_only=True):
    """What both endpoints share. None: the model's default, or off."""

    model: str | None = None
    n: int | None = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    min_tokens: int | None = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = False
    ignore_eos: bool | None = False
    skip_special_tokens: bool | None = True
    spaces_between_special_tokens: bool | None = True
    return_token_ids: bool | None = False
    return_tokens_as_token_ids: bool | None = False
    kv_transfer_params: dict[str, Any] | None = None
    # Named only to be refused: ignoring them would silently give another answer.
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: list[int] | None = None
    use_beam_search: bool | None = False
    truncate_prompt_tokens: int | None = None


class CompletionBody(SamplingBody, kw_only=True):
    """``POST /v1/completions``."""

    prompt: str | list[Any] = ""
    max_tokens: int | None = 16
    logprobs: int | None = None
    echo: bool | None = False
    suffix: str | None = None
    best_of: int | None = None
    add_special_tokens: bool | None = True


class ChatBody(SamplingBody, kw_only=True):
    """``POST /v1/chat/completions``."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    add_generation_prompt: bool | None = True
    continue_final_message: bool | None = False
    add_special_tokens: bool | None = False
    chat_template_kwargs: dict[str, Any] | None = None


_Body = TypeVar("_Body", bound=SamplingBody)


def parse(raw: bytes, kind: type[_Body]) -> _Body:
    """The body. Raises ApiError naming the field that is wrong, or unsupported."""
    try:
        body = msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise bad_request(f"the request body is not understood: {error}") from None
    form = (body.response_format or {}).get("type", "text")
    refused = {
        "response_format": form != "text",
        "structured_outputs": bool(body.structured_outputs),
        "prompt_logprobs": body.prompt_logprobs is not None,
        "logprob_token_ids": bool(body.logprob_token_ids),
        "use_beam_search": bool(body.use_beam_search),
        "truncate_prompt_tokens": body.truncate_prompt_tokens is not None,
    }
    if isinstance(body, CompletionBody):
        refused["suffix"] = bool(body.suffix)
        refused["best_of"] = body.best_of not in (None, body.n or 1)
        refused["echo"] = bool(body.echo) and body.logprobs is not None
    for name, is_refused in refused.items():
        if is_refused:
            detail = " together with logprobs" if name == "echo" else ""
            raise bad_request(f"{name}{detail} is not supported by this receiver", name)
    return body
