"""What only the ``nixl`` transport can get wrong."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

from mlx_receiver.transports import nixl, tcp_listener
from mlx_receiver.transports.nixl import NixlTransport
from mlx_receiver.transports.transport import Listener
from tests.wire import peers
from tests.wire.sink import TICKET, MemorySink, make_block

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("nixl") is None,
    reason="the package nixl is not installed (Linux only)",
)


@pytest.fixture
def sink() -> MemorySink:
    """The receiver's memory."""
    return MemorySink()


@pytest.fixture
def listener(sink: MemorySink) -> Iterator[Listener]:
    """The receiving end."""
    made = NixlTransport().listen("127.0.0.1", 0, sink)
    yield made
    made.close()


def test_a_payload_that_never_comes(
    listener: Listener, sink: MemorySink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp_listener, "FRAME_SECONDS", 0.5)
    with peers.enter(listener, TICKET) as sock:
        sock.sendall(make_block(1, 0)[0].pack())
        sink.wait(lambda: sink.pending == 1)
        sink.wait(lambda: sink.aborted == 1 and sink.pending == 0, 5)
        assert peers.closed(sock, 2)


@pytest.mark.parametrize("said", ["numbers", "words"])
def test_writes_that_nobody_asked_for(listener: Listener, sink: MemorySink, said: str) -> None:
    sender: Any = NixlTransport().connect(listener.endpoint, TICKET, 10.0)
    agent = sender._memory.agent
    for number in range(nixl.SLOTS + 5):
        note = str(number + 1000) if said == "numbers" else "slot"
        agent.send_notif(sender._peer, note.encode())
    sender._control.send(make_block(1, 0)[0])

    def ended() -> bool:
        agent.get_new_notifs()  # what has been sent leaves only when NIXL is called
        return sink.aborted == 1 and sink.pending == 0

    sink.wait(ended, 10)
    sender.close()
