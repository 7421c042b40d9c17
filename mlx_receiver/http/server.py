"""HTTP: health, metrics, the timelines of recent hand-offs, OpenAI's API and Anthropic's."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Final

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from mlx_receiver.control.desk import Desk
from mlx_receiver.http.access import Access
from mlx_receiver.http.admission import Admission, max_body_bytes
from mlx_receiver.http.anthropic.routes import messages_routes
from mlx_receiver.http.connections import Connection
from mlx_receiver.http.errors import ApiError
from mlx_receiver.http.openai.routes import api_routes
from mlx_receiver.http.openai.service import Service
from mlx_receiver.http.pairing import pairing_routes
from mlx_receiver.http.replies import as_json
from mlx_receiver.http.responses.routes import responses_routes
from mlx_receiver.http.served import Served
from mlx_receiver.http.status import Status, status_routes
from mlx_receiver.settings import Settings, SettingsError
from mlx_receiver.wire import addresses

logger = logging.getLogger(__name__)

#: Longest head of a request.
_MAX_HEAD_BYTES: Final = 16 << 10
#: Longest body of a request that brings no prompt.
_SMALL_BODY: Final = 16 << 10
#: What the system holds of an answer that is not read.
_SEND_BYTES: Final = 256 << 10


class HttpServer:
    """uvicorn in a thread."""

    def __init__(self, settings: Settings, app: Starlette) -> None:
        """Bind the port. Raises SettingsError when it cannot be used."""
        try:
            self._sockets = addresses.listening(settings.host, settings.http_port or 0)
        except OSError as error:
            at = addresses.spelled(settings.host, settings.http_port or 0)
            raise SettingsError(
                f"the HTTP port {at} cannot be used ({os.strerror(error.errno or 0)}): "
                "choose another with --http-port"
            ) from None
        self.port: int = self._sockets[0].getsockname()[1]
        for listener in self._sockets:
            # Connections inherit it; by itself the system holds megabytes for each slow reader.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            # As on a Mac, where uvicorn comes without uvloop.
            loop="asyncio",
            # A stranger's nonsense is not worth a line each.
            log_level="error",
            # Whom a request comes from is what the socket says.
            proxy_headers=False,
            # What is accepted at once, before any limit is looked at.
            backlog=64,
            h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, args=(self._sockets,), name="http", daemon=True
        )

    def start(self) -> None:
        """Serve; returns at once."""
        self._thread.start()

    def stop(self) -> None:
        """Stop serving and close the port."""
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join(timeout=1.5)
        for listener in self._sockets:
            listener.close()


def application(receiver: Served) -> Starlette:
    """All routes behind the checks of who asks and of how much is under way."""
    max_body = max_body_bytes(receiver.source.max_tokens)
    service = Service(receiver)
    routes = [
        *status_routes(receiver),
        *pairing_routes(receiver.desk),
        *api_routes(service),
        *responses_routes(service),
        *messages_routes(service),
    ]
    return _guarded(receiver.settings, routes, max_body, service.running)


def waiting_application(settings: Settings, desk: Desk) -> Starlette:
    """What a receiver without a model can answer: that it has none, and who wants to pair."""

    async def health(_request: Request) -> Response:
        return as_json(Status("waiting for a model"), 503)

    routes = [Route("/health", health), *pairing_routes(desk)]
    return _guarded(settings, routes, _SMALL_BODY, None)


def _guarded(
    settings: Settings,
    routes: list[BaseRoute],
    max_body: int,
    lifespan: Callable[[Starlette], AbstractAsyncContextManager[None]] | None,
) -> Starlette:
    return Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[
            Middleware(Access, settings=settings),
            Middleware(Admission, max_body=max_body),
        ],
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            Exception: _fault,
        },
    )


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response(request.url.path)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return ApiError(error.status_code, error.detail).response(request.url.path)


async def _fault(request: Request, error: Exception) -> Response:
    logger.error("a request failed", exc_info=error)
    failed = ApiError(500, "the request failed here: the receiver's log says why")
    return failed.response(request.url.path)
