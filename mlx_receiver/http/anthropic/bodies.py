"""Bodies of ``POST /v1/messages`` and ``/v1/messages/count_tokens``, with the ranges that vLLM 0.32
has. Fields that are not listed are ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from mlx_receiver.http.errors import refuse
from mlx_receiver.http.openai.bodies import (
    MAX_STOP_STRINGS,
    CommonBody,
    StopString,
    read,
)


class Text(msgspec.Struct, tag="text"):
    """Text."""

    text: str


class ToolUse(msgspec.Struct, tag="tool_use"):
    """A call that the model made."""

    id: str
    name: str
    input: dict[str, Any] = {}


class ToolResult(msgspec.Struct, tag="tool_result"):
    """What the client answered. No template knows ``is_error``: the content says it."""

    tool_use_id: str
    content: str | list[Text | Image | Document] | None = None


class Thinking(msgspec.Struct, tag="thinking"):
    """What the model thought."""

    thinking: str


class RedactedThinking(msgspec.Struct, tag="redacted_thinking"):
    """What nobody here can read."""


class Image(msgspec.Struct, tag="image"):
    """Named only to be refused."""


class Document(msgspec.Struct, tag="document"):
    """Named only to be refused."""


Block = Text | ToolUse | ToolResult | Thinking | RedactedThinking | Image | Document


class Message(msgspec.Struct):
    """What somebody said."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class Tool(msgspec.Struct):
    """A tool; one with another type than ``custom`` is Anthropic's own."""

    name: str
    input_schema: dict[str, Any] | None = None
    description: str | None = None
    type: str | None = None
    strict: bool | None = None
    defer_loading: bool | None = None


class ToolChoice(msgspec.Struct):
    """Whether the model calls tools, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingConfig(msgspec.Struct):
    """Whether the model is to think."""

    type: Literal["enabled", "disabled", "adaptive"]


class OutputFormat(msgspec.Struct):
    """What the text must look like."""

    schema: dict[str, Any] | None = None
    type: Literal["json_schema"] = "json_schema"


class OutputConfig(msgspec.Struct):
    """What the answer must look like, and how much a model is to think; templates may know that."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class Edit(msgspec.Struct):
    """What to leave out of a long conversation."""

    type: str


class ContextManagement(msgspec.Struct):
    """How a long conversation is to become shorter."""

    edits: list[Edit] = []


class CountBody(CommonBody, kw_only=True):
    """``POST /v1/messages/count_tokens``."""

    messages: list[Message]
    system: str | list[Text] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # Named only to be refused: ignoring them would silently give another answer.
    mcp_servers: list[Any] | None = None
    container: Any = None
    context_management: ContextManagement | None = None


class MessagesBody(CountBody, kw_only=True):
    """``POST /v1/messages``."""

    max_tokens: Annotated[int, Meta(ge=1)]
    stop_sequences: Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)] | None = None


def parse(raw: bytes, kind: type[CountBody], vocab_size: int) -> CountBody:
    """The body. Raises ApiError naming the field that is wrong, or unsupported."""
    body = read(raw, kind, vocab_size)
    thinks = body.thinking is not None and body.thinking.type == "enabled"
    edits = body.context_management.edits if body.context_management else []
    refuse(
        {
            "thinking.budget_tokens": thinks,
            "mcp_servers": bool(body.mcp_servers),
            "container": bool(body.container),
            # No answer of this receiver has thoughts to clear.
            "context_management": not all(e.type.startswith("clear_thinking_") for e in edits),
        }
    )
    return body
