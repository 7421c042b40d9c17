"""Request bodies, with the ranges that vLLM 0.32 has. Fields that are not listed are ignored:
clients and routers send many."""

from __future__ import annotations

import functools
import re
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import Meta, inspect

from mlx_receiver.http.errors import bad_request, refuse
from mlx_receiver.wire import trust
from mlx_receiver.wire.messages import E_UNSUPPORTED, WireError, clipped
from mlx_receiver.wire.ranges import (
    MAX_BAD_WORDS,
    MAX_INT,
    MAX_LOGPROBS,
    MAX_NAME,
    MAX_STOP_TOKENS,
    TokenId,
)

#: Samples of one request, its prompts times ``n``; each is a row of the batch.
MAX_SAMPLES: Final = 128
#: Stop strings, as VLLM_MAX_STOP_STRINGS has it, and the characters of each: what has been decoded
#: is compared with every beginning of them.
MAX_STOP_STRINGS: Final = 4
MAX_STOP_CHARACTERS: Final = 1024
#: Entries of ``logit_bias``: they are added at every step.
MAX_BIASES: Final = 4096
#: Objects and lists within one another, anywhere in a body.
MAX_DEPTH: Final = 64

#: A prompt's token; ``local.check_prompt`` compares it with the vocabulary.
_PromptToken = Annotated[int, Meta(ge=0, le=MAX_INT)]
StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARACTERS)]
#: ``stop`` of every endpoint.
StopStrings = StopString | Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)]
_Penalty = Annotated[float, Meta(ge=-2, le=2)]
_Word = Annotated[str, Meta(min_length=1, max_length=1024)]


#: What some templates make of it is their own affair.
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class StreamOptions(msgspec.Struct):
    """OpenAI's ``stream_options``; ``continuous_usage_stats`` is vLLM's."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class CommonBody(msgspec.Struct, kw_only=True):
    """What every endpoint that generates shares. None: the model's default, or off."""

    model: str | None = None
    stream: bool | None = False
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    logit_bias: Annotated[dict[str, float], Meta(max_length=MAX_BIASES)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOP_TOKENS)] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    cache_salt: Annotated[str, Meta(min_length=1, max_length=MAX_NAME)] | None = None
    kv_transfer_params: dict[str, Any] | None = None


class SamplingBody(CommonBody, kw_only=True):
    """What completions and chat completions share."""

    n: Annotated[int, Meta(ge=1, le=MAX_SAMPLES)] | None = 1
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    min_tokens: Annotated[int, Meta(ge=0)] = 0
    allowed_token_ids: Annotated[list[TokenId], Meta(min_length=1)] | None = None
    bad_words: Annotated[list[_Word], Meta(max_length=MAX_BAD_WORDS)] = []
    stop: StopStrings | None = None
    spaces_between_special_tokens: bool = True
    return_token_ids: bool | None = False
    return_tokens_as_token_ids: bool | None = False
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    logprob_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_LOGPROBS)] | None = None
    thinking_token_budget: Annotated[int, Meta(ge=-1)] | None = None
    # Named only to be refused: ignoring them would silently give another answer.
    prompt_logprobs: int | None = None
    use_beam_search: bool = False
    truncate_prompt_tokens: int | None = None
    repetition_detection: dict[str, Any] | None = None


class CompletionBody(SamplingBody, kw_only=True):
    """``POST /v1/completions``."""

    prompt: str | list[str | _PromptToken | list[_PromptToken]] | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_SAMPLES)] = 1
    max_tokens: Annotated[int, Meta(ge=1)] | None = 16
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = False
    suffix: str | None = None
    best_of: int | None = None
    add_special_tokens: bool = True
    prompt_embeds: str | list[str] | None = None


class ToolFunction(msgspec.Struct):
    """What a tool is called and takes."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct):
    """A member of ``tools``."""

    function: ToolFunction
    type: Literal["function"] = "function"


class ChatBody(SamplingBody, kw_only=True):
    """``POST /v1/chat/completions``."""

    messages: list[dict[str, Any]]
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = 0
    echo: bool = False
    tools: Annotated[list[dict[str, Any]], Meta(min_length=1)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | msgspec.UnsetType = msgspec.UNSET
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: ReasoningEffort | None = None
    chat_template: str | None = None


_Any = TypeVar("_Any", bound=msgspec.Struct)
_Body = TypeVar("_Body", bound=SamplingBody)

#: What stands in an error's text for the field at fault.
_PATH = re.compile(r"`\$\.(\w+)")
_FIELD = re.compile(r"\.(\w+)")


def parse(raw: bytes, kind: type[_Body], vocab_size: int) -> _Body:
    """The body. Raises ApiError naming the field that is wrong, or unsupported."""
    body = read(raw, kind, vocab_size)
    check(body)
    return body


def read(raw: bytes, kind: type[_Any], vocab_size: int) -> _Any:
    """The body, its fields in their ranges. Raises ApiError naming the one that is not."""
    try:
        # What is in the lists is not looked at before their types are known: that would take long.
        given = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        body = msgspec.json.decode(_coerced(raw, given, kind), type=kind, strict=False)
        trust.check(body, vocab_size, E_UNSUPPORTED)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        named = _PATH.search(str(error))
        raise bad_request(
            f"the request body is not understood: {clipped(str(error), 1024)}",
            named and named.group(1),
        ) from None
    except WireError as error:
        raise bad_request(error.reason, _FIELD.findall(error.reason)[0]) from None
    return body


def check(body: SamplingBody) -> None:
    """Raise ApiError for fields that are unsupported, or do not go together."""
    _check_depth(body)
    _refuse(body)
    if isinstance(body, ChatBody):
        _check_chat(body)
    wanted = getattr(body, "logprobs", None)
    if body.logprob_token_ids and (wanted is None or wanted is False):
        raise bad_request("logprob_token_ids needs logprobs", "logprob_token_ids")
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options needs stream to be true", "stream_options")


def _refuse(body: SamplingBody) -> None:
    """Raise ApiError for what cannot be honoured here."""
    refused = {
        "prompt_logprobs": body.prompt_logprobs is not None,
        "use_beam_search": body.use_beam_search,
        "truncate_prompt_tokens": body.truncate_prompt_tokens is not None,
        "repetition_detection": bool(body.repetition_detection),
    }
    if isinstance(body, CompletionBody):
        refused["suffix"] = bool(body.suffix)
        refused["best_of"] = body.best_of not in (None, body.n)
        refused["echo"] = bool(body.echo) and body.logprobs is not None
        refused["prompt_embeds"] = bool(body.prompt_embeds)
    elif isinstance(body, ChatBody):
        refused["chat_template"] = bool(body.chat_template)
    refuse(refused, echo=" together with logprobs")


def _check_chat(body: ChatBody) -> None:
    """Raise ApiError for fields that do not go together."""
    if body.top_logprobs and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs to be true", "top_logprobs")
    if body.continue_final_message and body.add_generation_prompt is True:
        raise bad_request(
            "continue_final_message and add_generation_prompt cannot both be true",
            "continue_final_message",
        )
    try:
        msgspec.convert(body.tools, list[Tool] | None)
    except msgspec.ValidationError as error:
        raise bad_request(f"tools: {clipped(str(error), 1024)}", "tools") from None


@functools.cache
def _shapeless(kind: type[SamplingBody]) -> tuple[str, ...]:
    """The fields that may hold anything; the types of the others say how deep they are."""

    def is_open(info: inspect.Type) -> bool:
        match info:
            case inspect.AnyType():
                return True
            case inspect.Metadata():
                return is_open(info.type)
            case inspect.UnionType():
                return any(map(is_open, info.types))
            case inspect.ListType():
                return is_open(info.item_type)
            case inspect.DictType():
                return is_open(info.value_type)
            case _:
                return False

    found = inspect.type_info(kind)
    assert isinstance(found, inspect.StructType)
    return tuple(field.name for field in found.fields if is_open(field.type))


def _check_depth(body: SamplingBody) -> None:
    """Raise ApiError where objects and lists nest too deeply: templates recurse."""
    if not trust.within_depth([getattr(body, name) for name in _shapeless(type(body))], MAX_DEPTH):
        raise bad_request(f"the request body nests deeper than {MAX_DEPTH} levels")


#: pydantic's words, which vLLM understands.
_WORDS: Final = dict.fromkeys(("true", "t", "yes", "y", "on", "1"), True) | dict.fromkeys(
    ("false", "f", "no", "n", "off", "0"), False
)
#: vLLM looks at these before pydantic does.
_NO_TEXT: Final = frozenset({"logprobs", "top_logprobs", "prompt_logprobs"})


def _coerced(raw: bytes, given: dict[str, msgspec.Raw], kind: type) -> bytes:
    """``raw``, of which ``given`` are the fields, with booleans and numbers that vLLM understands
    and msgspec does not written plainly.

    Raises ApiError for a text that msgspec would take for null.
    """
    plain = dict(given)
    for name, types in _scalars(kind).items():
        if name not in given or (text := bytes(given[name]))[:1] == b"[":
            continue
        if text[:1] == b"{":
            if name == "stream_options":
                inner = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
                plain[name] = msgspec.Raw(_coerced(text, inner, StreamOptions))
            continue
        value = msgspec.json.decode(text)
        if (changed := _plain(name, value, types)) is not value:
            plain[name] = msgspec.Raw(msgspec.json.encode(changed))
    return raw if plain == given else msgspec.json.encode(plain)


def _plain(name: str, value: Any, types: set[type]) -> Any:
    """The value of a field that may have ``types``, as msgspec understands it."""
    boolean = inspect.BoolType in types
    if isinstance(value, str) and inspect.StrType not in types:
        if boolean:
            if value.lower() not in _WORDS:
                raise bad_request(f"{name} must be true or false", name)
            return _WORDS[value.lower()]
        if name in _NO_TEXT or value.lower() == "null":
            raise bad_request(f"{name} must be a number", name)
    elif isinstance(value, bool) and not boolean:
        return int(value) if types & {inspect.IntType, inspect.FloatType} else value
    elif isinstance(value, float) and boolean and value in (0.0, 1.0):
        return bool(value)
    return value


@functools.cache
def _scalars(kind: type) -> dict[str, set[type]]:
    """The kinds of types that each field may have."""
    info = inspect.type_info(kind)
    assert isinstance(info, inspect.StructType)
    return {field.encode_name: set(_members(field.type)) for field in info.fields}


def _members(info: inspect.Type) -> list[type]:
    if isinstance(info, inspect.Metadata):
        return _members(info.type)
    if isinstance(info, inspect.UnionType):
        return [found for member in info.types for found in _members(member)]
    return [type(info)]
