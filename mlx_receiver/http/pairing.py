"""Pairing over HTTP, and who this receiver is: for machines that have no key yet.

Open to everybody who reaches the port: what is said here is public, or sealed with the one-time
code (``pairing.exchange``).
"""

from __future__ import annotations

import logging
from typing import Final, TypeVar

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from mlx_receiver.control.desk import Desk
from mlx_receiver.http.errors import ApiError, bad_request
from mlx_receiver.http.replies import as_json
from mlx_receiver.pairing.exchange import Closing, Greeting
from mlx_receiver.pairing.keystore import PairingError
from mlx_receiver.pairing.offer import Reception
from mlx_receiver.wire.seldom import printable

logger = logging.getLogger(__name__)

#: Bytes of the longest message of a pairing.
_MAX_BODY: Final = 8192

_Message = TypeVar("_Message", Greeting, Closing)


class Done(msgspec.Struct, frozen=True):
    """The two machines are paired."""

    paired: bool = True


def pairing_routes(desk: Desk) -> list[BaseRoute]:
    """Of a receiver, with a model or without one."""

    def host() -> Reception:
        if desk.reception is None:
            raise ApiError(
                409,
                "this receiver was started with a token, or for this machine alone, and pairs with "
                "nobody: give vLLM the same token (MAC_DECODE_TOKEN), or start it without --token "
                "and --host",
            )
        return desk.reception

    async def who(_request: Request) -> Response:
        host()  # of a key that follows from a token one could guess the token
        return as_json(desk.card)

    # In threads, since they wait for files and compute on curves.

    async def greet(request: Request) -> Response:
        message = await _message(request, Greeting)
        try:
            return as_json(await run_in_threadpool(host().greet, message))
        except PairingError as error:
            raise ApiError(403, str(error)) from None

    async def close(request: Request) -> Response:
        message = await _message(request, Closing)
        try:
            guest = await run_in_threadpool(host().close, message)
        except PairingError as error:
            logger.warning("a pairing failed: %s", printable(str(error)))
            raise ApiError(403, str(error)) from None
        logger.info("paired with %s (%s)", printable(guest.name), guest.instance)
        return as_json(Done())

    return [
        Route("/pair", who),
        Route("/pair/greeting", greet, methods=["POST"]),
        Route("/pair/closing", close, methods=["POST"]),
    ]


async def _message(request: Request, kind: type[_Message]) -> _Message:
    """Raises ApiError."""
    body = await request.body()
    if len(body) > _MAX_BODY:
        raise ApiError(413, f"a message of a pairing has at most {_MAX_BODY} bytes")
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise bad_request(f"no message of a pairing: {error}") from None
