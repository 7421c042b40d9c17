"""Server-sent events, and answers to clients that may go away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from mlx_receiver.http.errors import ApiError

_T = TypeVar("_T")

DONE = b"data: [DONE]\n\n"


def event(content: msgspec.Struct) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


def named_event(content: msgspec.Struct) -> bytes:
    """One server-sent event with a name, the struct's tag."""
    return f"event: {content.__struct_config__.tag}\n".encode() + event(content)


class Events(Protocol):
    """A streamed answer: its events, and what says that they are over."""

    end: bytes

    def events(self) -> AsyncGenerator[bytes, None]:
        """All but the last. Raises ApiError."""

    def failed(self, error: ApiError) -> bytes:
        """The event for an error."""


async def stream(request: Request, answer: Events) -> Response:
    """A streamed answer. An error before its first event is an HTTP error like any other."""
    events = answer.events()
    try:
        first = await unless_gone(request, _first(events))
    except BaseException:
        await events.aclose()
        raise

    async def body() -> AsyncGenerator[bytes, None]:
        async with contextlib.aclosing(events):
            yield first
            try:
                async for chunk in events:
                    yield chunk
            except ApiError as error:
                yield answer.failed(error)
            if answer.end:
                yield answer.end

    return StreamingResponse(body(), media_type="text/event-stream")


async def _first(events: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(events)


async def unless_gone(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """The work's result; it is cancelled when the client goes away.

    The body must have been read. Raises ApiError (to nobody) in that case.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client closed the connection")
        return task.result()
    finally:
        for waiting in (task, gone):
            waiting.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
