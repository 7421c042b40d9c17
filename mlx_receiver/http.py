"""HTTP: health, metrics, the timelines of recent hand-offs, and the OpenAI API."""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Any, Final

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from mlx_receiver import __version__
from mlx_receiver.api.access import Access
from mlx_receiver.api.admission import Admission, max_body_bytes
from mlx_receiver.api.errors import ApiError
from mlx_receiver.api.routes import api_routes
from mlx_receiver.connections import Connection
from mlx_receiver.session import Ended, Session
from mlx_receiver.settings import SettingsError
from mlx_receiver.wire import addresses

if TYPE_CHECKING:
    from mlx_receiver.receiver import Receiver

logger = logging.getLogger(__name__)

#: Longest head of a request.
_MAX_HEAD_BYTES: Final = 16 << 10
#: What the system holds of an answer that is not read.
_SEND_BYTES: Final = 256 << 10


class HttpServer:
    """uvicorn in a thread."""

    def __init__(self, receiver: Receiver) -> None:
        """Bind the port. Raises SettingsError when it cannot be used."""
        settings = receiver.settings
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
            application(receiver),
            http=Connection,
            ws="none",
            # As on a Mac, where uvicorn comes without uvloop.
            loop="asyncio",
            # A stranger's nonsense is not worth a line each.
            log_level="error",
            lifespan="off",
            # Whom a request comes from is what the socket says.
            proxy_headers=False,
            # What is accepted at once, before any limit is looked at.
            backlog=64,
            h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)

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

    def _run(self) -> None:
        self._server.run(sockets=self._sockets)


def application(receiver: Receiver) -> Starlette:
    """All routes behind the checks of who asks and of how much is under way."""
    max_body = max_body_bytes(receiver.source.max_tokens)
    return Starlette(
        routes=routes(receiver),
        middleware=[
            Middleware(Access, settings=receiver.settings),
            Middleware(Admission, max_body=max_body),
        ],
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            Exception: _fault,
        },
    )


async def _api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return ApiError(error.status_code, error.detail).response()


async def _fault(_request: Request, error: Exception) -> Response:
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "the request failed here: the receiver's log says why").response()


def routes(receiver: Receiver) -> list[BaseRoute]:
    """The receiver's own routes."""

    async def health(request: Request) -> Response:
        loaded = receiver.engine.loaded
        status = receiver.status
        code = 200 if status == "ok" else 503
        if not request.state.trusted:
            return JSONResponse({"status": status}, code)
        from mlx_receiver.receiver import engine_name, machine_name

        store = receiver.store
        body = {
            "status": status,
            "version": __version__,
            "engine": engine_name(),
            "machine": machine_name(),
            "model": receiver.source.name,
            "dtype": loaded.dtype if loaded is not None else None,
            "sessions": len(store.sessions()),
            "decoding": receiver.engine.decoding,
            "waiting": receiver.engine.waiting,
            "clients": receiver.control.clients,
            "kv_reserved_bytes": store.reserved_bytes,
            "kv_memory_bytes": store.budget_bytes,
            "uptime_seconds": round(time.monotonic() - receiver.started, 3),
        }
        return JSONResponse(body, code)

    # These are no coroutines: Starlette runs them in a thread, since they may take long.

    def metrics(_request: Request) -> Response:
        return Response(generate_latest(receiver.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def handoffs(_request: Request) -> Response:
        store = receiver.store
        known: list[Session | Ended] = [*store.recent(), *store.sessions()]
        return JSONResponse([_summary(session) for session in known])

    def handoff(request: Request) -> Response:
        wanted = request.path_params["request_id"]
        store = receiver.store
        known: list[Session | Ended] = [*store.recent(), *store.sessions()]
        for session in reversed(known):
            if session.request_id == wanted:
                blocks = [dataclasses.asdict(block) for block in list(session.timeline.blocks)]
                return JSONResponse({**_summary(session), "blocks": blocks})
        return JSONResponse({"error": f"no hand-off of request {wanted} is remembered"}, 404)

    return [
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/handoffs", handoffs),
        Route("/handoffs/{request_id:path}", handoff),
        *api_routes(receiver),
    ]


def _summary(session: Session | Ended) -> dict[str, Any]:
    timeline = session.timeline
    times = {
        field.name: getattr(timeline, field.name)
        for field in dataclasses.fields(timeline)
        if field.name != "blocks"
    }
    return {
        "request_id": session.request_id,
        "state": session.state.value,
        "prompt_tokens": session.tokens,
        "output_tokens": session.decoded + 1 if session.decoded else 0,
        "kv_bytes": session.kv_bytes,
        **times,
    }
