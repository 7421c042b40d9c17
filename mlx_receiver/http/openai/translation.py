"""Chat completions in another API's words: what its endpoints have in common."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterator, Mapping

import msgspec
from msgspec import UNSET
from starlette.responses import Response

from mlx_receiver.http.errors import ApiError
from mlx_receiver.http.openai.bodies import ChatBody, CommonBody, check
from mlx_receiver.http.openai.chat import Chat
from mlx_receiver.http.openai.generation import merged
from mlx_receiver.http.openai.responses import TokenLogprobs, ToolCall
from mlx_receiver.http.openai.sample import Sample
from mlx_receiver.http.openai.streams import named_event
from mlx_receiver.http.replies import as_json


class Piece(msgspec.Struct):
    """What an answer has grown by: text, the log-probabilities of its tokens, and whole calls."""

    text: str
    calls: list[ToolCall]
    logprobs: list[TokenLogprobs | msgspec.Raw]


class Translation(ABC):
    """See ``answer.Told``: an answer of one sample, told in typed events.

    What does not stream is made of the same events, so that both say the same.
    """

    #: Nothing follows the last event.
    end = b""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self.streams = chat.streams

    @property
    def sample(self) -> Sample:
        """The only one."""
        return self.chat.samples[0]

    @abstractmethod
    def opening(self) -> Iterator[msgspec.Struct]:
        """The events before the first text."""

    @abstractmethod
    def push(self, piece: Piece) -> Iterator[msgspec.Struct]:
        """Add to the answer; the events that tell of it."""

    @abstractmethod
    def closing(self, finish: str, stop: str | None) -> Iterator[msgspec.Struct]:
        """The events at the end. ``finish`` is chat's ``finish_reason``, ``stop`` the stop string
        that was reached."""

    @abstractmethod
    def whole(self) -> msgspec.Struct:
        """The answer in one, after everything has been pushed."""

    @abstractmethod
    def failed(self, error: ApiError) -> bytes:
        """The event for an error."""

    async def in_one(self) -> Response:
        events = self._events()
        async with contextlib.aclosing(events):
            async for _ in events:
                pass
        return as_json(self.whole())

    async def events(self) -> AsyncGenerator[bytes, None]:
        events = self._events()
        async with contextlib.aclosing(events):
            async for event in events:
                yield named_event(event)

    async def _events(self) -> AsyncGenerator[msgspec.Struct, None]:
        begun = False
        deltas = merged(self.chat.service, self.chat.samples)
        async with contextlib.aclosing(deltas):
            async for delta in deltas:
                if not begun:
                    for event in self.opening():
                        yield event
                begun = True
                choice = self.chat.push(delta)
                if choice is None or choice.delta is UNSET:
                    continue
                piece = Piece(
                    choice.delta.content or "",
                    choice.delta.tool_calls or [],
                    choice.logprobs.content if choice.logprobs else [],
                )
                for event in self.push(piece):
                    yield event
                if choice.finish_reason is not None:
                    stop = choice.stop_reason if isinstance(choice.stop_reason, str) else None
                    for event in self.closing(choice.finish_reason, stop):
                        yield event


def chat_body(given: CommonBody, **fields: object) -> ChatBody:
    """The chat that a request amounts to, checked as any other. Raises ApiError."""
    common = {name: getattr(given, name) for name in CommonBody.__struct_fields__}
    body = ChatBody(**common, **fields)  # type: ignore[arg-type]
    check(body)
    return body


@contextlib.contextmanager
def called(names: Mapping[str, str]) -> Iterator[None]:
    """Fields in errors are called as the client calls them; ``names`` are by chat's."""
    try:
        yield
    except ApiError as error:
        raise error.renamed(names) from None
