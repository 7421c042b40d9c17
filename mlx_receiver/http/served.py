"""What the HTTP server shows and uses: a receiver, as far as it is concerned."""

from __future__ import annotations

from typing import Literal, Protocol

from mlx_receiver.control.desk import Desk
from mlx_receiver.control.server import ControlServer
from mlx_receiver.decode.engine import DecodeEngine
from mlx_receiver.decode.model import ModelSource
from mlx_receiver.decode.speed import Speed
from mlx_receiver.metrics import Metrics
from mlx_receiver.sessions.service import SessionService
from mlx_receiver.sessions.store import SessionStore
from mlx_receiver.settings import Settings


class Served(Protocol):
    """``receiver.Receiver`` is one."""

    settings: Settings
    source: ModelSource
    engine: DecodeEngine
    store: SessionStore
    sessions: SessionService
    control: ControlServer
    metrics: Metrics
    speed: Speed | None
    #: Who may come in.
    desk: Desk
    #: When it was made, by ``time.monotonic()``.
    started: float

    @property
    def status(self) -> Literal["ok", "loading", "failing"]:
        """What ``GET /health`` says: "failing" while nothing can be decoded."""
