"""``POST /v1/messages`` and ``/v1/messages/count_tokens``."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from mlx_receiver.http.anthropic import chats
from mlx_receiver.http.anthropic import objects as o
from mlx_receiver.http.anthropic.bodies import CountBody, MessagesBody, parse
from mlx_receiver.http.errors import ApiError
from mlx_receiver.http.openai.answer import respond
from mlx_receiver.http.openai.bodies import ChatBody
from mlx_receiver.http.openai.chat import Chat, converse, prompt_ids
from mlx_receiver.http.openai.responses import ToolCall
from mlx_receiver.http.openai.service import Service
from mlx_receiver.http.openai.streams import named_event
from mlx_receiver.http.openai.translation import Piece, Translation, called
from mlx_receiver.http.replies import as_json


class _Messages(Translation):
    """Blocks one after the other: text between calls is a block."""

    def __init__(self, chat: Chat) -> None:
        super().__init__(chat)
        self._blocks: list[o.Text | o.ToolUse] = []
        #: The text block that grows, joined once; None where none does.
        self._text: list[str] | None = None
        self._message = o.MessageObject(
            id=f"msg_{uuid.uuid4().hex}", content=[], model=chat.service.model, usage=self._usage(0)
        )

    def opening(self) -> Iterator[msgspec.Struct]:
        # With the prompt's tokens; only now is it known how many were in a prefix cache.
        self._message.usage = self._usage(0)
        yield o.MessageStart(self._message)
        yield o.Ping()

    def push(self, piece: Piece) -> Iterator[msgspec.Struct]:
        if piece.text:
            if self._text is None:
                self._text = []
                yield o.BlockStart(len(self._blocks), o.Text())
            self._text.append(piece.text)
            yield o.BlockDelta(len(self._blocks), o.TextDelta(piece.text))
        for call in piece.calls:
            yield from self._end()
            yield from self._call(call)

    def closing(self, finish: str, stop: str | None) -> Iterator[msgspec.Struct]:
        yield from self._end()
        message = self._message
        # Anthropic's form of an empty answer.
        message.content = [*self._blocks] or [o.Text()]
        message.usage = self._usage(len(self.chat.token_ids(0)))
        message.stop_reason = "end_turn"
        if finish == "length":
            message.stop_reason = "max_tokens"
        elif any(isinstance(block, o.ToolUse) for block in self._blocks):
            message.stop_reason = "tool_use"
        elif stop is not None:
            message.stop_reason, message.stop_sequence = "stop_sequence", stop
        yield o.MessageDelta(o.Stop(message.stop_reason, message.stop_sequence), message.usage)
        yield o.MessageStop()

    def whole(self) -> o.MessageObject:
        return self._message

    def failed(self, error: ApiError) -> bytes:
        return named_event(error.anthropic_body())

    def _end(self) -> Iterator[msgspec.Struct]:
        """Complete the text block that grows, if there is one."""
        if self._text is not None:
            yield o.BlockStop(len(self._blocks))
            self._blocks.append(o.Text("".join(self._text)))
            self._text = None

    def _call(self, call: ToolCall) -> Iterator[msgspec.Struct]:
        index, name, arguments = len(self._blocks), call.function.name, call.function.arguments
        self._blocks.append(o.ToolUse(call.id, name, _object(arguments)))
        yield o.BlockStart(index, o.ToolUse(call.id, name, {}))
        yield o.BlockDelta(index, o.InputDelta(arguments))
        yield o.BlockStop(index)

    def _usage(self, produced: int) -> o.Usage:
        cached = self.sample.cached_tokens
        return o.Usage(len(self.sample.prompt) - cached, produced, 0, cached)


def _object(arguments: str) -> Any:
    """A call's input; what is no JSON is shown as it is."""
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


async def messages(service: Service, request: Request) -> Response:
    """Answer a conversation. Raises ApiError."""
    return await respond(service, request, _prepare)


async def count_tokens(service: Service, request: Request) -> Response:
    """Tell how many tokens a conversation's prompt has. Raises ApiError."""
    raw = await request.body()
    return as_json(await service.workers.run(len(raw), _count, service, raw))


def _prepare(service: Service, raw: bytes, http: Request) -> _Messages:
    chat = _chat(service, parse(raw, MessagesBody, service.vocab_size))
    with called(chats.NAMES):
        return _Messages(converse(service, chat, http))


def _count(service: Service, raw: bytes) -> o.Count:
    body = parse(raw, CountBody, service.vocab_size)
    service.check_model(body.model)
    chat = _chat(service, body)
    with called(chats.NAMES):
        tokens = len(prompt_ids(service, chat))
    return o.Count(tokens, o.CountManagement(tokens))


def _chat(service: Service, body: CountBody) -> ChatBody:
    def anywhere() -> bool:
        """Whether the template takes system messages between others."""
        roles = ("system", "user", "system", "user")
        try:
            service.tokenizer.chat([{"role": role, "content": "t"} for role in roles], None, {})
        except ApiError:
            return False
        return True

    return chats.chat(body, anywhere)
