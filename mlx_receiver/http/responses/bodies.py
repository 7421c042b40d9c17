"""The body of ``POST /v1/responses``, with the ranges that vLLM 0.32 has. Fields that are not
listed are ignored."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from mlx_receiver.http.errors import ApiError, refuse
from mlx_receiver.http.openai.bodies import CommonBody, ReasoningEffort, StopStrings, read
from mlx_receiver.wire.ranges import MAX_LOGPROBS

#: ``include`` has this where log-probabilities are wanted.
LOGPROBS: Final = "message.output_text.logprobs"
_Include = Literal[
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
]
_Status = Literal["in_progress", "completed", "incomplete"]


class Reasoning(msgspec.Struct):
    """How much a model is to think; templates may know ``effort``."""

    effort: ReasoningEffort | None = None
    summary: str | None = None
    generate_summary: str | None = None


class TextFormat(msgspec.Struct):
    """What the text must look like."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class TextConfig(msgspec.Struct):
    """``text``. No template knows a verbosity."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class FunctionTool(msgspec.Struct, tag="function", kw_only=True):
    """A function that the client runs."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponsesBody(CommonBody, kw_only=True):
    """``POST /v1/responses``. Items and tools are looked at one by one: errors name the one."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    max_tool_calls: int | None = None
    metadata: dict[str, str] | None = None
    parallel_tool_calls: bool | None = True
    reasoning: Reasoning | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] = "auto"
    store: bool | None = True
    text: TextConfig | None = None
    tool_choice: str | dict[str, Any] = "auto"
    tools: list[dict[str, Any]] = msgspec.field(default_factory=list)
    include: list[_Include] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = 0
    truncation: Literal["auto", "disabled"] | None = "disabled"
    user: str | None = None
    stop: StopStrings | None = None
    structured_outputs: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # Named only to be refused: ignoring them would silently give another answer.
    background: bool | None = False
    conversation: str | dict[str, Any] | None = None
    previous_response_id: str | None = None
    previous_input_messages: list[Any] | None = None
    prompt: dict[str, Any] | None = None
    enable_response_messages: bool = False


def parse(raw: bytes, vocab_size: int) -> ResponsesBody:
    """The body. Raises ApiError naming the field that is wrong, or unsupported."""
    body = read(raw, ResponsesBody, vocab_size)
    if body.previous_response_id is not None:
        # vLLM's answer where it keeps none.
        raise ApiError(
            404,
            f"Response with id {body.previous_response_id[:256]!r} not found: this receiver keeps "
            "no responses; send the whole conversation in input",
            "previous_response_id",
        )
    refuse(
        {
            "background": bool(body.background),
            "conversation": body.conversation is not None,
            "previous_input_messages": bool(body.previous_input_messages),
            "prompt": body.prompt is not None,
            "enable_response_messages": body.enable_response_messages,
            "truncation": body.truncation == "auto",
        },
        truncation=" auto",
    )
    return body


class Part(msgspec.Struct):
    """A part of a message's content."""

    type: str
    text: str | None = None
    refusal: str | None = None


class Message(msgspec.Struct, tag="message"):
    """What somebody said."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Part]
    status: _Status | None = None


class FunctionCall(msgspec.Struct, tag="function_call"):
    """A call that the model made; ``arguments`` is JSON."""

    call_id: str
    name: str
    arguments: str
    status: _Status | None = None


class FunctionCallOutput(msgspec.Struct, tag="function_call_output"):
    """What the client answered."""

    call_id: str
    output: str | list[Part]
    status: _Status | None = None


class ReasoningItem(msgspec.Struct, tag="reasoning"):
    """What the model thought, as it said it or, failing that, in short."""

    summary: list[Part] = []
    content: list[Part] | None = None
    encrypted_content: str | None = None
    status: _Status | None = None


Item = Message | FunctionCall | FunctionCallOutput | ReasoningItem
ITEM_TYPES: Final = ("message", "function_call", "function_call_output", "reasoning")
