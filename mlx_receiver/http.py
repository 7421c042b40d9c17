"""HTTP: health, metrics, the timelines of recent hand-offs, and the OpenAI API."""

from __future__ import annotations

import dataclasses
import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from mlx_receiver import __version__
from mlx_receiver.api.routes import api_routes
from mlx_receiver.session import Session
from mlx_receiver.settings import SettingsError

if TYPE_CHECKING:
    from mlx_receiver.receiver import Receiver


class HttpServer:
    """uvicorn in a thread."""

    def __init__(self, receiver: Receiver) -> None:
        """Bind the port. Raises SettingsError when it cannot be used."""
        settings = receiver.settings
        try:
            self._socket = socket.create_server((settings.host, settings.http_port or 0))
        except OSError as error:
            raise SettingsError(
                f"the HTTP port {settings.host}:{settings.http_port} cannot be used "
                f"({os.strerror(error.errno or 0)}): choose another with --http-port"
            ) from None
        self.port: int = self._socket.getsockname()[1]
        config = uvicorn.Config(
            Starlette(routes=routes(receiver)),
            log_level="warning",
            lifespan="off",
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
        self._socket.close()

    def _run(self) -> None:
        self._server.run(sockets=[self._socket])


def routes(receiver: Receiver) -> list[BaseRoute]:
    """The receiver's own routes."""

    async def health(_request: Request) -> Response:
        loaded = receiver.engine.loaded
        store = receiver.store
        body = {
            "status": "ok" if loaded is not None else "loading",
            "version": __version__,
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
        return JSONResponse(body, 200 if loaded is not None else 503)

    async def metrics(_request: Request) -> Response:
        return Response(generate_latest(receiver.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def handoffs(_request: Request) -> Response:
        store = receiver.store
        known = [*store.recent(), *store.sessions()]
        return JSONResponse([_summary(session) for session in known])

    async def handoff(request: Request) -> Response:
        wanted = request.path_params["request_id"]
        store = receiver.store
        for session in reversed([*store.recent(), *store.sessions()]):
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


def _summary(session: Session) -> dict[str, Any]:
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
