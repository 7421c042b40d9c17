"""What a receiver tells of itself: health, metrics, and its latest hand-offs."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from mlx_receiver import __version__
from mlx_receiver.decode.device import engine_name, machine_name
from mlx_receiver.http.replies import as_json
from mlx_receiver.http.served import Served
from mlx_receiver.metrics import QUANTILES
from mlx_receiver.planning.shown import Shown
from mlx_receiver.sessions.session import Ended, Session
from mlx_receiver.wire.handoffs import HandoffSummary, HandoffTimes


class Status(msgspec.Struct, frozen=True):
    """``/health`` for everybody."""

    status: str


class Health(Status, frozen=True, kw_only=True):
    """``/health`` for those who may know."""

    version: str = __version__
    engine: str
    machine: str
    model: str
    dtype: str | None
    sessions: int
    decoding: int
    waiting: int
    clients: list[str]
    #: By client: the address that its KV comes to, how fast, and the MTU.
    paths: dict[str, str]
    #: By client: what comparing its cache with the receiver's own gave.
    proofs: dict[str, str]
    kv_reserved_bytes: int
    kv_resident_bytes: int
    kv_memory_bytes: int
    uptime_seconds: float


class Unknown(msgspec.Struct, frozen=True):
    """A hand-off that is not remembered."""

    error: str


def status_routes(receiver: Served) -> list[BaseRoute]:
    """The receiver's own routes."""

    async def health(request: Request) -> Response:
        loaded = receiver.engine.loaded
        status = receiver.status
        code = 200 if status == "ok" else 503
        if not request.state.trusted:
            return as_json(Status(status), code)
        store = receiver.store
        health = Health(
            status=status,
            engine=engine_name(),
            machine=machine_name(),
            model=receiver.source.name,
            dtype=loaded.dtype if loaded is not None else None,
            sessions=len(store.sessions()),
            decoding=receiver.engine.decoding,
            waiting=receiver.engine.waiting,
            clients=receiver.control.clients,
            paths=receiver.control.paths,
            proofs=receiver.control.proofs,
            kv_reserved_bytes=store.reserved_bytes,
            kv_resident_bytes=store.residents.nbytes,
            kv_memory_bytes=store.budget_bytes,
            uptime_seconds=round(time.monotonic() - receiver.started, 3),
        )
        return as_json(health, code)

    def known() -> list[Session | Ended]:
        return [*receiver.store.recent(), *receiver.store.sessions()]

    # These are no coroutines: Starlette runs them in a thread, since they may take long.

    def metrics(_request: Request) -> Response:
        return Response(generate_latest(receiver.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def handoffs(_request: Request) -> Response:
        return as_json([_told(session) for session in known()])

    def handoff(request: Request) -> Response:
        wanted = request.path_params["request_id"]
        for session in reversed(known()):
            if session.request_id == wanted:
                return as_json(_told(session, with_blocks=True))
        return as_json(Unknown(f"no hand-off of request {wanted} is remembered"), 404)

    def profile(_request: Request) -> Response:
        speed, links = receiver.speed, receiver.control.links
        if speed is None:
            return as_json(Shown(links=links))
        errors = {
            phase: {str(q): speed.error(q, phase) for q in QUANTILES}
            for phase in ("prefill", "decode")
        }
        return as_json(Shown(speed.profile, speed.saved, speed.measuring, errors, links))

    return [
        Route("/profile", profile),
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/handoffs", handoffs),
        Route("/handoffs/{request_id:path}", handoff),
    ]


def _told(session: Session | Ended, with_blocks: bool = False) -> HandoffSummary:
    timeline = session.timeline
    fields: dict[str, Any] = {
        "request_id": session.request_id,
        "strategy": session.strategy.value,
        "plan": session.plan,
        "state": session.phase.value,
        "prompt_tokens": session.tokens,
        "held_tokens": session.held_tokens,
        "output_tokens": session.output_tokens,
        "kv_bytes": session.kv_bytes,
    }
    for field in dataclasses.fields(timeline):
        fields[field.name] = getattr(timeline, field.name)
    blocks = list(fields.pop("blocks"))
    return HandoffTimes(**fields, blocks=blocks) if with_blocks else HandoffSummary(**fields)
