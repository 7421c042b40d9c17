"""What only the ``zmq`` transport can get wrong."""

from __future__ import annotations

import contextlib
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from mlx_receiver.transports import zmq as zmq_data
from mlx_receiver.transports.transport import Sender
from mlx_receiver.transports.zmq import ZmqListener, ZmqTransport
from mlx_receiver.wire.frames import MAX_PAYLOAD, Header, Kind
from tests.wire import peers
from tests.wire.sink import OTHER, TICKET, MemorySink, make_block

#: ZMTP 3.1's greeting of a PLAIN client.
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"PLAIN".ljust(20, b"\0") + bytes(32)


@pytest.fixture
def sink() -> MemorySink:
    """The receiver's memory."""
    return MemorySink()


@pytest.fixture
def listener(sink: MemorySink) -> Iterator[ZmqListener]:
    """The receiving end."""
    made = ZmqListener("127.0.0.1", 0, sink)
    yield made
    made.close()


@pytest.fixture
def worker(listener: ZmqListener, sink: MemorySink) -> Iterator[Sender]:
    """Somebody else's connection, which must not notice anything."""
    sender = ZmqTransport().connect(listener.endpoint, OTHER, 10.0)
    yield sender
    works(sender, sink)
    sender.close()


def works(sender: Sender, sink: MemorySink) -> None:
    """A block lands at once."""
    number = len(sink.order)
    began = time.monotonic()
    sender.send(*make_block(77, number))
    sink.wait(lambda: (77, number) in sink.landed)
    assert time.monotonic() - began < 2


def dealer(context: zmq.Context[Any], listener: ZmqListener, **options: bytes) -> zmq.Socket[bytes]:
    """A socket of ZeroMQ's own, with those options."""
    made: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    made.linger = 0
    made.sndtimeo = 3000
    for name, value in options.items():
        made.setsockopt(getattr(zmq, name), value)
    made.connect(f"tcp://127.0.0.1:{listener.endpoint.port}")
    return made


def test_a_block_is_of_whoever_proved_itself(
    listener: ZmqListener, worker: Sender, sink: MemorySink
) -> None:
    header, rows = make_block(1, 0)
    parts = [header.pack(), b"".join(rows)]
    proof = zmq_data._password(TICKET.key, listener.endpoint.nonce)
    with zmq.Context() as context:
        claims = dealer(
            context,
            listener,
            PLAIN_USERNAME=TICKET.client.encode(),
            PLAIN_PASSWORD=proof,
            ROUTING_ID=OTHER.client.encode(),
        )
        claims.send_multipart(parts)
        sink.wait(lambda: (1, 0) in sink.landed)
        claims.close()
    assert sink.owners[1, 0] == TICKET.client


@pytest.mark.parametrize("shows", ["nothing", "a user", "the key"])
def test_strangers_get_nothing_through(
    listener: ZmqListener, worker: Sender, sink: MemorySink, shows: str
) -> None:
    options = {
        "nothing": {},
        "a user": {"PLAIN_USERNAME": TICKET.client.encode(), "PLAIN_PASSWORD": b"x"},
        # Proofs are no keys.
        "the key": {
            "PLAIN_USERNAME": TICKET.client.encode(),
            "PLAIN_PASSWORD": TICKET.key.hex().encode(),
        },
    }[shows]
    with zmq.Context() as context:
        stranger = dealer(context, listener, **options)
        # ZeroMQ has nobody to send it to while the connection is being refused.
        with contextlib.suppress(zmq.Again):
            stranger.send(Header(Kind.ATTACH, 5, 0).pack())
        works(worker, sink)
        time.sleep(0.3)
        stranger.close()
    assert sink.attachments == []


@pytest.mark.parametrize("greets", [False, True])
def test_a_stranger_that_says_no_more_is_closed(
    sink: MemorySink, monkeypatch: pytest.MonkeyPatch, greets: bool
) -> None:
    monkeypatch.setattr(zmq_data, "_HANDSHAKE_MS", 500)
    listener = ZmqListener("127.0.0.1", 0, sink)
    with peers.call(listener) as sock:
        if greets:
            sock.sendall(GREETING)
        assert peers.closed(sock, 3)
    listener.close()


def test_a_stranger_cannot_make_the_receiver_allocate(
    listener: ZmqListener, worker: Sender
) -> None:
    with peers.call(listener) as sock:
        # The header of a long command.
        sock.sendall(GREETING + b"\x06" + struct.pack(">Q", MAX_PAYLOAD // 2))
        assert peers.closed(sock, 2)


@pytest.mark.parametrize("where", ["_admit", "_receive", "_post", "_turn"])
def test_the_thread_goes_on_after_a_fault(
    listener: ZmqListener,
    worker: Sender,
    sink: MemorySink,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    left = [2]
    real = getattr(listener, where)

    def failing(*arguments: Any) -> None:
        if left[0] and threading.current_thread().name == "data-zmq":
            left[0] -= 1
            if where == "_admit":
                listener._doorman.send(b"no answer of ZAP")
            raise RuntimeError("a fault")
        real(*arguments)

    monkeypatch.setattr(listener, where, failing)
    for _ in range(3):
        try:
            sender = ZmqTransport().connect(listener.endpoint, TICKET, 1.0)
        except ConnectionError:
            continue
        sender.send(Header(Kind.ATTACH, 5, 0))
        time.sleep(0.3)
        sender.close()
    assert not left[0]


def test_a_fault_of_the_sink_ends_one_handshake(
    listener: ZmqListener, worker: Sender, sink: MemorySink
) -> None:
    sink.clients.insert(0, object())  # type: ignore[arg-type]
    with pytest.raises(ConnectionError):
        ZmqTransport().connect(listener.endpoint, TICKET, 1.0)
    del sink.clients[0]
    ZmqTransport().connect(listener.endpoint, TICKET, 5.0).close()


def test_refused_connections_are_forgotten_in_the_end(
    listener: ZmqListener, worker: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zmq_data, "_MAX_REFUSED", 3)
    for _ in range(6):
        sender = ZmqTransport().connect(listener.endpoint, TICKET, 5.0)
        with contextlib.suppress(ConnectionError):
            sender.send(Header(Kind.CREDIT, 1, 0))
            time.sleep(0.05)
        sender.close()
    assert len(listener._refused) == 3
