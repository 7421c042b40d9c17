"""What ``/v1/responses`` says, field by field as vLLM 0.32 writes it: items, the response, and the
events of a stream."""

from __future__ import annotations

from typing import Any

import msgspec

from mlx_receiver.http.openai.responses import TokenLogprobs
from mlx_receiver.http.responses.bodies import FunctionTool, Reasoning, TextConfig

_Logprobs = list[TokenLogprobs | msgspec.Raw]


class OutputText(msgspec.Struct, tag="output_text", kw_only=True):
    """A message's content."""

    text: str
    annotations: list[Any] = []
    logprobs: _Logprobs | None = None


class OutputMessage(msgspec.Struct, tag="message", kw_only=True):
    """What the model said."""

    id: str
    role: str = "assistant"
    status: str
    content: list[OutputText]


class FunctionCall(msgspec.Struct, tag="function_call", kw_only=True):
    """A call that the client is to make; ``arguments`` is JSON."""

    id: str
    call_id: str
    name: str
    arguments: str
    status: str


OutputItem = OutputMessage | FunctionCall


class InputDetails(msgspec.Struct, frozen=True):
    """Tokens of the prompt that were in a prefix cache."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputDetails(msgspec.Struct, frozen=True):
    """Nothing tells reasoning from the rest, and tools are the client's."""

    reasoning_tokens: int = 0
    tool_output_tokens: int = 0


class ResponseUsage(msgspec.Struct, frozen=True):
    """Tokens in, out, and both together."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class IncompleteDetails(msgspec.Struct, frozen=True):
    """Why an answer ended early."""

    reason: str


class ResponseError(msgspec.Struct, frozen=True):
    """Why there is no answer."""

    code: str
    message: str


class ResponseObject(msgspec.Struct, kw_only=True):
    """The response, finished or not."""

    id: str
    created_at: int
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    metadata: dict[str, str] | None
    model: str
    object: str = "response"
    output: list[OutputItem]
    parallel_tool_calls: bool
    temperature: float
    tool_choice: str | dict[str, Any]
    tools: list[FunctionTool]
    top_p: float
    background: bool = False
    max_output_tokens: int
    max_tool_calls: int | None
    previous_response_id: None = None
    prompt: None = None
    reasoning: Reasoning | None
    service_tier: str
    status: str
    text: TextConfig | None
    top_logprobs: int | None
    truncation: str = "disabled"
    usage: ResponseUsage | None = None
    user: str | None
    presence_penalty: float
    frequency_penalty: float
    kv_transfer_params: None = None


class _Event(msgspec.Struct, kw_only=True):
    sequence_number: int = 0


class _Whole(_Event, kw_only=True):
    response: ResponseObject


class Created(_Whole, tag="response.created"):
    """The first event."""


class InProgress(_Whole, tag="response.in_progress"):
    """Decoding has begun."""


class Completed(_Whole, tag="response.completed"):
    """The last event."""


class Incomplete(_Whole, tag="response.incomplete"):
    """The last event where ``max_output_tokens`` or the context has ended the answer."""


class Failed(_Whole, tag="response.failed"):
    """The last event after an error."""


class _OfItem(_Event, kw_only=True):
    output_index: int
    item: OutputItem


class ItemAdded(_OfItem, tag="response.output_item.added"):
    """An item begins."""


class ItemDone(_OfItem, tag="response.output_item.done"):
    """An item is complete."""


class _InItem(_Event, kw_only=True):
    item_id: str
    output_index: int


class _InPart(_InItem, kw_only=True):
    content_index: int = 0


class PartAdded(_InPart, tag="response.content_part.added", kw_only=True):
    """A message's content begins."""

    part: OutputText


class PartDone(_InPart, tag="response.content_part.done", kw_only=True):
    """A message's content is complete."""

    part: OutputText


class TextDelta(_InPart, tag="response.output_text.delta", kw_only=True):
    """Text."""

    delta: str
    logprobs: _Logprobs = []


class TextDone(_InPart, tag="response.output_text.done", kw_only=True):
    """All of a message's text."""

    text: str
    logprobs: _Logprobs = []


class ArgumentsDelta(_InItem, tag="response.function_call_arguments.delta", kw_only=True):
    """A part of a call's arguments."""

    delta: str


class ArgumentsDone(_InItem, tag="response.function_call_arguments.done", kw_only=True):
    """All of a call's arguments."""

    name: str
    arguments: str


Event = (
    Created | InProgress | Completed | Incomplete | Failed | ItemAdded | ItemDone | PartAdded
    | PartDone | TextDelta | TextDone | ArgumentsDelta | ArgumentsDone
)  # fmt: skip
