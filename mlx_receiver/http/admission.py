"""How much is let in at once: requests, and the bytes of their bodies."""

from __future__ import annotations

import asyncio
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_receiver.http.errors import ApiError

#: Requests under way; connections are more, so that the others hear a 503 at once.
MAX_REQUESTS: Final = 256
#: Seconds in which a body must have come.
_BODY_SECONDS: Final = 30.0
#: Bytes of a body for each token of the model's context: its prompt as ids and as text.
_BYTES_PER_TOKEN: Final = 16
_LEAST_BODY: Final = 1 << 20
_LARGEST_BODY: Final = 16 << 20
#: Bodies of the largest size that may be under way together, whatever their number.
_LARGEST_BODIES: Final = 8


def max_body_bytes(max_tokens: int) -> int:
    """The largest body for a model with a context of ``max_tokens``."""
    return min(max(max_tokens * _BYTES_PER_TOKEN, _LEAST_BODY), _LARGEST_BODY)


class Admission:
    """Middleware that reads the body of every POST, within bounds, before the endpoint is called.

    What a body has taken is given back when its request is over: its prompts live as long.
    """

    def __init__(self, app: ASGIApp, max_body: int) -> None:
        self._app = app
        self._max_body = max_body
        self._max_bytes = max_body * _LARGEST_BODIES
        self._requests = 0
        self._bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if self._requests >= MAX_REQUESTS:
            busy = ApiError(503, f"{self._requests} requests are under way: try again later")
            await busy.response(scope["path"])(scope, receive, send)
            return
        self._requests += 1
        body = bytearray()
        try:
            try:
                await self._read(scope, receive, body)
            except ApiError as error:
                await error.response(scope["path"])(scope, receive, send)
                return
            await self._app(scope, _replay(bytes(body), receive), send)
        finally:
            self._requests -= 1
            self._bytes -= len(body)

    async def _read(self, scope: Scope, receive: Receive, body: bytearray) -> None:
        """Fill ``body``, and count it. Raises ApiError."""
        announced = Headers(scope=scope).get("content-length", "")
        self._check(int(announced) if announced.isascii() and announced.isdecimal() else 0)
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(499, "the client closed the connection")
                    part = message.get("body", b"")
                    self._check(len(body) + len(part), len(body))
                    body += part
                    self._bytes += len(part)
                    more = message.get("more_body", False)
        except TimeoutError:
            raise ApiError(408, f"the body took over {_BODY_SECONDS:.0f} s") from None

    def _check(self, size: int, held: int = 0) -> None:
        """Raise ApiError unless a body of which ``held`` bytes are counted may have ``size``."""
        if size > self._max_body:
            raise ApiError(413, f"the request body is over {self._max_body >> 10} KiB")
        if self._bytes - held + size > self._max_bytes:
            raise ApiError(503, "the requests under way are too large: try again later")


def _replay(body: bytes, receive: Receive) -> Receive:
    """``receive`` with the body in one message before what comes next."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return waiting.pop() if waiting else await receive()

    return again
