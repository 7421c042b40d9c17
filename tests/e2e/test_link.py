"""The control connection to a real receiver that stops, dies and comes back."""

from __future__ import annotations

import queue
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlx_receiver.decode.model import find_model
from mlx_receiver.wire import messages as m
from mlx_receiver.wire.handshake import Introduction
from mlx_receiver.wire.layout import layout_from_config
from tests.servers import Receiver, start_receiver
from vllm_mac_decode.scheduler.candidates import candidates
from vllm_mac_decode.scheduler.link import Link
from vllm_mac_decode.settings import Settings

pytestmark = pytest.mark.server


class Events:
    """A ``LinkListener`` that remembers."""

    def __init__(self) -> None:
        self.seen: queue.Queue[str] = queue.Queue()

    def taken(self, receiver: str) -> bool:
        return False

    def connected(self, welcome: m.Welcome) -> bool:
        self.seen.put("connected")
        return True

    def disconnected(self, reason: str) -> None:
        self.seen.put(reason)

    def message(self, message: m.ReceiverMessage, arrived: float) -> None:
        pass

    def idle(self) -> bool:
        return True

    def tick(self, now: float) -> None:
        pass


@pytest.fixture
def start(tiny_llama_path: Path, tmp_path: Path) -> Iterator[Callable[[], Receiver]]:
    """Starts the receiver, always at the same address."""
    started: list[Receiver] = []

    def again() -> Receiver:
        ports = {"port": started[0].port, "http_port": started[0].http_port} if started else {}
        log = tmp_path / f"receiver-{len(started)}.log"
        started.append(start_receiver(tiny_llama_path, log, **ports))
        return started[-1]

    yield again
    for receiver in started:
        receiver.server.stop()


def test_a_lost_receiver_is_noticed_at_once_and_used_again(
    start: Callable[[], Receiver], tiny_llama_path: Path
) -> None:
    receiver = start()
    # No clock can be what notices.
    settings = Settings(receiver=receiver.address, stall_timeout=60.0)
    events = Events()
    source = find_model(str(tiny_llama_path))
    me = Introduction(source.signature, layout_from_config(source.config, "float32"))
    link = Link(settings, me, events, candidates(settings), receiver.address)
    link.start()
    try:
        assert events.seen.get(timeout=10) == "connected"
        receiver.server.signal(signal.SIGKILL)
        assert events.seen.get(timeout=20) == "it closed the connection"
        assert link.target is None
        receiver = start()
        assert events.seen.get(timeout=10) == "connected"
        receiver.server.signal(signal.SIGTERM)
        assert events.seen.get(timeout=20) == "the receiver is stopping"
        receiver.server.process.wait(timeout=15)
        start()
        assert events.seen.get(timeout=10) == "connected"
        assert link.target is not None
    finally:
        link.close()
