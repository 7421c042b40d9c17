"""What only the socket listener can get wrong."""

from __future__ import annotations

import threading

import pytest

from mlx_receiver.wire import hooks, tcp
from mlx_receiver.wire.frames import DataHello
from tests.waiting import eventually
from tests.wire.sink import TOKEN, MemorySink


def test_a_connection_accepted_while_the_listener_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    accepted, closed = threading.Event(), threading.Event()

    def held_up(sock: object) -> None:
        if threading.current_thread().name == "bulk-accept":
            accepted.set()
            closed.wait(10)

    monkeypatch.setattr(tcp, "tune", held_up)
    listener = hooks.transport("tcp").listen("127.0.0.1", 0, MemorySink())
    assert isinstance(listener, tcp.TcpListener)
    sock, _ = tcp.dial(listener.endpoint, DataHello(TOKEN, "late"), 5.0)
    assert accepted.wait(10)
    closing = threading.Thread(target=listener.close)
    closing.start()
    assert eventually(lambda: listener._server.fileno() < 0)
    closed.set()
    closing.join()
    # The listener's end is closed, with a HELLO that nobody read: the client sees a reset.
    sock.settimeout(5)
    with pytest.raises(ConnectionResetError):
        sock.recv(1)
    sock.close()
