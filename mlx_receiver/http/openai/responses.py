"""Response bodies, field by field as vLLM 0.32 writes them: null and absent are not the same."""

from __future__ import annotations

from typing import Generic, TypeVar

import msgspec
from msgspec import UNSET, UnsetType


class CachedTokens(msgspec.Struct, frozen=True):
    """Tokens of the prompt that were in a prefix cache."""

    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """Tokens in, both together, and out."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: CachedTokens


class CompletionLogprobs(msgspec.Struct):
    """Of each token: where it begins in the text, its own, and the likeliest by their names."""

    text_offset: list[int] = []
    token_logprobs: list[float] = []
    tokens: list[str] = []
    top_logprobs: list[dict[str, float] | msgspec.Raw] = []


class Alternative(msgspec.Struct):
    """A token and how likely it was."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobs(Alternative):
    """A sampled token, beside the likeliest in its place."""

    top_logprobs: list[Alternative]


class ChatLogprobs(msgspec.Struct):
    """Of each token."""

    content: list[TokenLogprobs | msgspec.Raw] = []


class CompletionChoice(msgspec.Struct, kw_only=True):
    """A text, or what it grows by."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    prompt_token_ids: list[int] | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType | None = UNSET
    prompt_logprobs: UnsetType | None = UNSET


class FunctionCall(msgspec.Struct, frozen=True):
    """A function's name, and its arguments as JSON in a text."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, kw_only=True):
    """A call; in a stream ``index`` says which one of its message."""

    id: str
    function: FunctionCall
    type: str = "function"
    index: int | UnsetType = UNSET


class ChatMessage(msgspec.Struct, kw_only=True):
    """A message, or what it grows by."""

    role: str | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, kw_only=True):
    """A message: ``message`` in an answer, ``delta`` in a stream."""

    index: int
    message: ChatMessage | UnsetType = UNSET
    delta: ChatMessage | UnsetType = UNSET
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType | None = UNSET


ChoiceT = TypeVar("ChoiceT", CompletionChoice, ChatChoice)


class Reply(msgspec.Struct, Generic[ChoiceT], kw_only=True):
    """An answer, or a chunk of one."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChoiceT]
    usage: Usage | UnsetType = UNSET
    prompt_logprobs: UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType | None = UNSET
    kv_transfer_params: UnsetType | None = UNSET


class ModelCard(msgspec.Struct, kw_only=True):
    """A model that is served."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "mlx-receiver"
    root: str
    parent: str | None = None
    max_model_len: int


class ModelList(msgspec.Struct, kw_only=True):
    """Every model that is served."""

    object: str = "list"
    data: list[ModelCard]
