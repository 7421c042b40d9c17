"""What ``/v1/messages`` says: content blocks, the message, and the events of a stream."""

from __future__ import annotations

from typing import Any

import msgspec


class Text(msgspec.Struct, tag="text"):
    """What the model said."""

    text: str = ""


class ToolUse(msgspec.Struct, tag="tool_use"):
    """A call that the client is to make."""

    id: str
    name: str
    input: Any


class Usage(msgspec.Struct, frozen=True):
    """Tokens; those of the prompt are either in ``input_tokens`` or were in a prefix cache."""

    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int


class MessageObject(msgspec.Struct, tag="message", kw_only=True):
    """The message, finished or not."""

    id: str
    role: str = "assistant"
    content: list[Text | ToolUse]
    model: str
    stop_reason: str | None = None
    stop_sequence: str | None = None
    usage: Usage


class MessageStart(msgspec.Struct, tag="message_start"):
    """The first event."""

    message: MessageObject


class Ping(msgspec.Struct, tag="ping"):
    """That the server is there."""


class BlockStart(msgspec.Struct, tag="content_block_start"):
    """A block begins."""

    index: int
    content_block: Text | ToolUse


class TextDelta(msgspec.Struct, tag="text_delta"):
    """Text."""

    text: str


class InputDelta(msgspec.Struct, tag="input_json_delta"):
    """A part of a call's input."""

    partial_json: str


class BlockDelta(msgspec.Struct, tag="content_block_delta"):
    """What a block grows by."""

    index: int
    delta: TextDelta | InputDelta


class BlockStop(msgspec.Struct, tag="content_block_stop"):
    """A block is complete."""

    index: int


class Stop(msgspec.Struct):
    """Why the message ended."""

    stop_reason: str
    stop_sequence: str | None


class MessageDelta(msgspec.Struct, tag="message_delta"):
    """How the message ended."""

    delta: Stop
    usage: Usage


class MessageStop(msgspec.Struct, tag="message_stop"):
    """The last event."""


class CountManagement(msgspec.Struct):
    """Tokens before anything is left out: nothing is."""

    original_input_tokens: int


class Count(msgspec.Struct):
    """Tokens of a prompt."""

    input_tokens: int
    context_management: CountManagement
