"""The ``tcp`` listener and those who come to its door: strangers, and clients that misbehave."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from mlx_receiver.transports import tcp_listener
from mlx_receiver.transports.tcp import TcpTransport
from mlx_receiver.transports.tcp_listener import TcpListener
from mlx_receiver.transports.transport import Sender
from mlx_receiver.wire.frames import DataHello, DataReply, Header, Kind
from mlx_receiver.wire.keys import new_nonce
from tests.waiting import eventually
from tests.wire import peers
from tests.wire.sink import OTHER, TICKET, MemorySink, make_block

Calls = list[socket.socket]


@pytest.fixture
def worker(listener: TcpListener, sink: MemorySink) -> Iterator[Sender]:
    """Somebody else's connection, which must not notice anything."""
    sender = TcpTransport().connect(listener.endpoint, OTHER, 10.0)
    works(sender, sink)
    yield sender
    works(sender, sink)
    sender.close()


@pytest.fixture
def calls() -> Iterator[Calls]:
    """Sockets that are closed at the end."""
    made: Calls = []
    yield made
    for sock in made:
        sock.close()


def works(sender: Sender, sink: MemorySink, session: int = 77) -> None:
    """A block lands at once."""
    number = len(sink.order)
    began = time.monotonic()
    sender.send(*make_block(session, number))
    sink.wait(lambda: (session, number) in sink.landed)
    assert time.monotonic() - began < 2


def newcomer(listener: TcpListener, sink: MemorySink) -> None:
    """A client that comes now is served."""
    began = time.monotonic()
    sender = TcpTransport().connect(listener.endpoint, TICKET, 5.0)
    works(sender, sink, session=78)
    sender.close()
    assert time.monotonic() - began < 3


# --- accepting ----------------------------------------------------------------------------------


class _WasReset(socket.socket):
    """What macOS's accept returns for a connection that was reset while it waited."""

    def setsockopt(self, *_: Any) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


@pytest.mark.parametrize("address", ["", (), None, ("127.0.0.1", 5)])
def test_connections_that_were_reset_before_they_are_accepted(
    listener: TcpListener,
    worker: Sender,
    sink: MemorySink,
    monkeypatch: pytest.MonkeyPatch,
    address: Any,
) -> None:
    accept, left = socket.socket.accept, [3]

    def reset_already(self: socket.socket) -> Any:
        sock, real = accept(self)
        if not left[0]:
            return sock, real
        left[0] -= 1
        return _WasReset(fileno=sock.detach()), address

    monkeypatch.setattr(socket.socket, "accept", reset_already)
    for _ in range(3):
        with peers.call(listener) as sock:
            assert peers.closed(sock, 2)
    assert not left[0]
    newcomer(listener, sink)


@pytest.mark.parametrize("fault", [ConnectionAbortedError, MemoryError, ValueError])
def test_accept_that_fails(
    listener: TcpListener,
    worker: Sender,
    sink: MemorySink,
    monkeypatch: pytest.MonkeyPatch,
    fault: type[Exception],
) -> None:
    accept, left = socket.socket.accept, [3]

    def failing(self: socket.socket) -> Any:
        if left[0]:
            left[0] -= 1
            raise fault("a fault")
        return accept(self)

    monkeypatch.setattr(socket.socket, "accept", failing)
    newcomer(listener, sink)
    assert not left[0]


def test_no_descriptors_left(
    listener: TcpListener, worker: Sender, sink: MemorySink, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept, tries = socket.socket.accept, []

    def counted(self: socket.socket) -> Any:
        tries.append(time.monotonic())
        return accept(self)

    monkeypatch.setattr(socket.socket, "accept", counted)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as waiting:
        used = len(os.listdir("/dev/fd"))
        spare: list[int] = [os.open("/dev/null", os.O_RDONLY) for _ in range(used + 64)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(spare) + 1, hard))
        try:
            with contextlib.suppress(OSError):
                while True:
                    spare.append(os.dup(spare[0]))
            waiting.connect(("127.0.0.1", listener.endpoint.port))
            time.sleep(1.0)
            assert 0 < len(tries) < 50
        finally:
            for descriptor in spare:
                os.close(descriptor)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        newcomer(listener, sink)


def test_no_threads_left(
    listener: TcpListener,
    worker: Sender,
    sink: MemorySink,
    calls: Calls,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_thread(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        calls.append(peers.enter(listener, TICKET))
        assert peers.closed(calls[0], 5)
    newcomer(listener, sink)


def test_a_listener_that_closes_ends_handshakes(sink: MemorySink, calls: Calls) -> None:
    listener = TcpListener("127.0.0.1", 0, sink)
    calls += [peers.call(listener), peers.enter(listener, TICKET)]
    assert eventually(lambda: len(listener._strangers) == len(listener._connections) == 1)
    began = time.monotonic()
    listener.close()
    assert time.monotonic() - began < 2
    assert all(peers.closed(sock, 2) for sock in calls)


# --- strangers ----------------------------------------------------------------------------------


def test_strangers_shut_nobody_out(
    listener: TcpListener, worker: Sender, sink: MemorySink, calls: Calls
) -> None:
    before = threading.active_count()
    for number in range(300):
        calls.append(peers.call(listener, source=f"127.0.0.{2 + number % 6}"))
    # So that only the number counts: nobody's time is over yet.
    newcomer(listener, sink)
    assert eventually(lambda: len(listener._strangers) <= tcp_listener.MAX_STRANGERS)
    assert threading.active_count() <= before + 1  # the newcomer's
    assert peers.closed(calls[0], 2)
    assert not peers.closed(calls[-1], 0.2)


def test_one_address_has_fewer_places(
    listener: TcpListener, worker: Sender, sink: MemorySink, calls: Calls
) -> None:
    elsewhere = peers.call(listener, source="127.0.0.9")
    calls.append(elsewhere)
    for _ in range(100):
        calls.append(peers.call(listener, source="127.0.0.8"))
    newcomer(listener, sink)
    of_address = [s for s in listener._strangers if s.host == "127.0.0.8"]
    assert len(of_address) == tcp_listener.MAX_STRANGERS_OF_ADDRESS
    assert not peers.closed(elsewhere, 0.2)


@pytest.mark.parametrize("says", ["nothing", "a byte now and then"])
def test_the_whole_handshake_has_a_time(
    listener: TcpListener,
    worker: Sender,
    calls: Calls,
    monkeypatch: pytest.MonkeyPatch,
    says: str,
) -> None:
    monkeypatch.setattr(tcp_listener, "HANDSHAKE_SECONDS", 0.6)
    sock = peers.call(listener)
    calls.append(sock)
    began = time.monotonic()
    if says == "nothing":
        assert peers.closed(sock, 5)
    else:
        with pytest.raises(OSError):
            for byte in Header(Kind.HELLO, 0, 1000).pack() + bytes(1000):
                time.sleep(0.1)
                sock.send(bytes([byte]))
    assert 0.4 < time.monotonic() - began < 2.5


def test_a_handshake_byte_by_byte_is_read(
    listener: TcpListener, sink: MemorySink, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    sock = peers.call(listener)
    calls.append(sock)
    whole = socket.socket.sendall

    def bytewise(self: socket.socket, data: Any) -> None:
        for byte in bytes(data):
            whole(self, bytes([byte]))

    with monkeypatch.context() as patch:
        patch.setattr(socket.socket, "sendall", bytewise)
        peers.introduce(sock, TICKET)
    sock.sendall(Header(Kind.ATTACH, 5, 0).pack())
    assert peers.hear(sock)[0].kind is Kind.REPLY


def _hello(payload: bytes, kind: Kind = Kind.HELLO, claimed: int | None = None) -> bytes:
    return Header(kind, 0, len(payload) if claimed is None else claimed).pack() + payload


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: mac-studio.local:7791\r\nUser-Agent: curl\r\nAccept: */*\r\n\r\n",
        _hello(b"", claimed=64 << 20),
        _hello(b"", claimed=2000),
        _hello(b""),
        _hello(b"\x81\xa6client\xc1"),
        _hello(bytes(100), Kind.PROOF),
        Header(Kind.ATTACH, 5, 0).pack(),
        make_block(5, 0)[0].pack(),
    ],
    ids=["http", "64 MiB", "2000", "empty", "garbage", "proof", "attach", "block"],
)
def test_whoever_says_something_else_is_closed_at_once(
    listener: TcpListener, worker: Sender, sink: MemorySink, calls: Calls, said: bytes
) -> None:
    sock = peers.call(listener)
    calls.append(sock)
    sock.sendall(said)
    assert peers.closed(sock, 2)
    assert sink.attachments == [] and not any(session == 5 for session, _ in sink.landed)


def test_a_wrong_proof_is_closed_before_its_frames_are_read(
    listener: TcpListener, worker: Sender, sink: MemorySink, calls: Calls
) -> None:
    sock = peers.call(listener)
    calls.append(sock)
    peers.introduce(sock, TICKET, key=OTHER.key)
    with contextlib.suppress(OSError):
        sock.sendall(Header(Kind.ATTACH, 5, 0).pack())
    assert peers.closed(sock, 2)
    assert sink.attachments == []


def test_a_fault_of_the_sink_ends_one_handshake(
    listener: TcpListener, worker: Sender, sink: MemorySink, calls: Calls
) -> None:
    # A client that cannot be compared: an error that nobody has foreseen.
    sink.clients.insert(0, object())  # type: ignore[arg-type]
    sock = peers.call(listener)
    calls.append(sock)
    peers.say(sock, Kind.HELLO, DataHello("x", new_nonce(), "clear"))
    assert peers.closed(sock, 2)
    del sink.clients[0]
    newcomer(listener, sink)


# --- clients ------------------------------------------------------------------------------------


def test_a_client_has_so_many_connections(
    listener: TcpListener,
    worker: Sender,
    sink: MemorySink,
    calls: Calls,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tcp_listener, "MAX_OF_CLIENT", 3)
    calls += [peers.enter(listener, TICKET) for _ in range(4)]
    assert peers.closed(calls[3], 2)
    assert not peers.closed(calls[0], 0.2)
    calls[0].close()
    assert eventually(lambda: len(listener._connections) == 3)
    newcomer(listener, sink)


def test_all_clients_have_so_many_connections(
    listener: TcpListener, worker: Sender, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp_listener, "MAX_CONNECTIONS", 2)
    calls += [peers.enter(listener, TICKET) for _ in range(2)]
    assert peers.closed(calls[1], 2)
    assert not peers.closed(calls[0], 0.2)


@pytest.mark.parametrize("says", ["nothing", "a byte now and then"])
def test_a_frame_has_a_time(
    listener: TcpListener,
    worker: Sender,
    sink: MemorySink,
    calls: Calls,
    monkeypatch: pytest.MonkeyPatch,
    says: str,
) -> None:
    monkeypatch.setattr(tcp_listener, "FRAME_SECONDS", 0.6)
    idle, slow = (peers.enter(listener, TICKET) for _ in range(2))
    calls += [idle, slow]
    header, _ = make_block(1, 0, tokens=4096, width=128)
    began = time.monotonic()
    slow.sendall(header.pack() + bytes(1000))
    sink.wait(lambda: sink.pending == 1)
    if says == "nothing":
        assert peers.closed(slow, 5)
    else:
        with pytest.raises(OSError):
            while time.monotonic() < began + 5:
                time.sleep(0.1)
                slow.send(b"x")
    assert 0.4 < time.monotonic() - began < 2.5
    sink.wait(lambda: sink.aborted == 1 and sink.pending == 0, seconds=2)
    # Between frames there is no hurry.
    idle.sendall(Header(Kind.ATTACH, 5, 0).pack())
    assert peers.hear(idle)[0].kind is Kind.REPLY


def test_a_client_that_has_gone_loses_its_connections(
    listener: TcpListener, worker: Sender, sink: MemorySink, calls: Calls
) -> None:
    calls.append(peers.enter(listener, TICKET))
    assert not peers.closed(calls[0], 1.5)
    sink.clients.remove(TICKET)
    assert peers.closed(calls[0], 3)


def test_replies_that_nobody_reads(
    listener: TcpListener, worker: Sender, sink: MemorySink, calls: Calls
) -> None:
    sock = peers.enter(listener, TICKET)
    calls.append(sock)
    sock.sendall(Header(Kind.ATTACH, 5, 0).pack())
    sink.wait(lambda: len(sink.replies) == 1)
    began, said = time.monotonic(), 0
    while not sink.detachments and time.monotonic() < began + 20:
        before = time.monotonic()
        sink.replies[0](DataReply(5, True, "", "x" * 4000))
        assert time.monotonic() - before < 0.5
        said += 1
    assert sink.detachments == [(TICKET.client, 5)]
    assert said < 5000


def test_endless_talk_is_read_slowly(
    listener: TcpListener, worker: Sender, sink: MemorySink, calls: Calls
) -> None:
    sock = peers.enter(listener, TICKET)
    calls.append(sock)
    over = threading.Event()

    def chatter() -> None:
        many = b"".join(Header(Kind.ATTACH, number, 0).pack() for number in range(1, 400))
        with contextlib.suppress(OSError):
            while not over.is_set():
                sock.sendall(many)

    def read() -> None:
        with contextlib.suppress(OSError):
            while sock.recv(1 << 20):
                pass

    threads = [threading.Thread(target=work, daemon=True) for work in (chatter, read)]
    for thread in threads:
        thread.start()
    time.sleep(2.0)
    heard = len(sink.attachments)
    works(worker, sink)
    over.set()
    sock.shutdown(socket.SHUT_RDWR)  # it is still connected: fast talk is no fault
    for thread in threads:
        thread.join(10)
    assert 200 < heard <= 3 * tcp_listener.MAX_IDLE_TALK
