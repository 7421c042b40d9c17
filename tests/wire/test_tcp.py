"""The sending end of ``tcp`` and a receiver that is none, lies, or never stops."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import msgspec
import pytest

from mlx_receiver import plugins
from mlx_receiver.transports.transport import TransportError
from mlx_receiver.wire import frames
from mlx_receiver.wire.frames import Header, Kind
from mlx_receiver.wire.keys import new_ticket
from mlx_receiver.wire.messages import Endpoint, WireError
from tests.wire import peers
from tests.wire.sink import TICKET

TCP = plugins.transport("tcp")


@pytest.mark.parametrize("says", ["wrong proof", "HTTP", "too much", "nothing", "goodbye"])
def test_a_program_that_is_not_the_receiver_gets_no_proof(says: str) -> None:
    heard: list[bytes] = []
    ended = threading.Event()

    def answer(server: socket.socket) -> None:
        sock, _ = server.accept()
        with sock:
            sock.settimeout(10)
            heard.append(peers.hear(sock)[1])
            if says == "wrong proof":
                peers.say(sock, Kind.CHALLENGE, frames.DataChallenge(bytes(32), bytes(32)))
            elif says == "HTTP":
                sock.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n" + bytes(64))
            elif says == "too much":
                sock.sendall(Header(Kind.CHALLENGE, 0, 64 << 20).pack() + bytes(60000))
            if says != "goodbye":
                with contextlib.suppress(ConnectionResetError):
                    heard.append(sock.recv(4096))
        ended.set()

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        threading.Thread(target=answer, args=[server], daemon=True).start()
        with pytest.raises(TransportError, match=f"127.0.0.1:{port}") as raised:
            TCP.connect(Endpoint("tcp", "127.0.0.1", port), TICKET, 1.0)
        assert ended.wait(10)
    # What is too much is not waited for.
    assert ("another program" in str(raised.value)) == (says not in ("nothing", "goodbye"))
    assert frames.hello_decoder.decode(heard[0]).client == TICKET.client
    assert heard[1:] in ([], [b""])


def test_a_greeting_byte_by_byte_ends_in_time() -> None:
    def drip(server: socket.socket) -> None:
        sock, _ = server.accept()
        with sock:
            for byte in Header(Kind.CHALLENGE, 0, 100).pack() + bytes(100):
                time.sleep(0.1)
                try:
                    sock.send(bytes([byte]))
                except OSError:
                    return

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=drip, args=[server], daemon=True).start()
        began = time.monotonic()
        with pytest.raises(TransportError, match="in time"):
            TCP.connect(Endpoint("tcp", "127.0.0.1", server.getsockname()[1]), TICKET, 1.0)
        assert time.monotonic() - began < 2


def test_a_receiver_that_gave_another_ticket() -> None:
    with (
        peers.receiver(new_ticket(), lambda sock: None) as endpoint,
        pytest.raises(TransportError, match="another program answers"),
    ):
        TCP.connect(endpoint, TICKET, 5.0)


def _reply(reason: str) -> bytes:
    body = msgspec.msgpack.encode(frames.DataReply(1, False, "session", reason))
    return Header(Kind.REPLY, 1, len(body)).pack() + body


def test_replies_that_never_end_hold_nobody_up() -> None:
    def flood(sock: socket.socket) -> None:
        many = _reply("x" * 4000) * 50
        while True:
            sock.sendall(many)

    with peers.receiver(TICKET, flood) as endpoint:
        sender = TCP.connect(endpoint, TICKET, 5.0)
        time.sleep(0.3)
        found = 0
        for _ in range(20):
            began = time.monotonic()
            count = len(sender.replies())
            assert count < 200 and time.monotonic() - began < 1
            found += count
        assert found
        sender.close()


@pytest.mark.parametrize("name", ["tcp", "nixl"])
@pytest.mark.parametrize("kind", [Kind.REPLY, Kind.CREDIT])
def test_a_large_reply_is_refused_unread(name: str, kind: Kind) -> None:
    if name not in plugins.transports():
        pytest.skip("the package nixl is not installed (Linux only)")

    def talk(sock: socket.socket) -> None:
        sock.sendall(Header(kind, 1, 32 << 20).pack())
        sock.recv(1 << 20)
        sock.recv(1)

    with (
        peers.receiver(TICKET, talk) as endpoint,
        pytest.raises((WireError, TransportError), match="33554432 bytes"),
    ):
        sender = plugins.transport(name).connect(endpoint, TICKET, 5.0)
        try:
            for _ in range(100):
                assert sender.replies() == []
                time.sleep(0.01)
        finally:
            sender.close()


@pytest.mark.parametrize("slots", [0, 1 << 40])
def test_a_ring_of_absurd_size_is_refused(slots: int) -> None:
    if "nixl" not in plugins.transports():
        pytest.skip("the package nixl is not installed (Linux only)")

    def talk(sock: socket.socket) -> None:
        ring = {"metadata": b"", "address": 4096, "slots": slots, "slot_bytes": 1 << 20}
        peers.say(sock, Kind.CREDIT, ring)
        sock.recv(1 << 20)
        sock.recv(1)

    with (
        peers.receiver(TICKET, talk) as endpoint,
        pytest.raises(TransportError, match="slots"),
    ):
        plugins.transport("nixl").connect(endpoint, TICKET, 5.0)
