"""Peers that speak the handshake of the ``tcp`` transport by hand, to misbehave afterwards."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from mlx_receiver.transports.transport import Listener
from mlx_receiver.wire import frames
from mlx_receiver.wire.frames import HEADER_BYTES, Header, Kind
from mlx_receiver.wire.keys import new_nonce, proof
from mlx_receiver.wire.messages import DataTicket, Endpoint


def call(listener: Listener, source: str = "127.0.0.1") -> socket.socket:
    """A connection that has said nothing yet."""
    address = ("127.0.0.1", listener.endpoint.port)
    sock = socket.create_connection(address, 10, source_address=(source, 0))
    sock.settimeout(10)
    return sock


def say(sock: socket.socket, kind: Kind, message: Any) -> None:
    """A frame of the handshake."""
    body = msgspec.msgpack.encode(message)
    sock.sendall(Header(kind, 0, len(body)).pack() + body)


def hear(sock: socket.socket) -> tuple[Header, bytes]:
    """The next frame. Raises ConnectionError when the other side closes instead."""
    header = frames.unpack(read(sock, HEADER_BYTES))
    return header, read(sock, header.payload_bytes)


def read(sock: socket.socket, count: int) -> bytes:
    """So many bytes. Raises ConnectionError when the other side closes before."""
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        if not more:
            raise ConnectionResetError("closed")
        data += more
    return data


def closed(sock: socket.socket, seconds: float = 10.0) -> bool:
    """Whether the other side closes within that time, whatever it says before."""
    sock.settimeout(seconds)
    try:
        while sock.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


def introduce(sock: socket.socket, ticket: DataTicket, key: bytes = b"") -> None:
    """A client's handshake, with another key than the ticket's if wanted."""
    nonce = new_nonce()
    say(sock, Kind.HELLO, frames.DataHello(ticket.client, nonce, "clear"))
    challenge = frames.challenge_decoder.decode(hear(sock)[1])
    answer = proof(key or ticket.key, "client", nonce, challenge.nonce, b"clear")
    say(sock, Kind.PROOF, frames.DataProof(answer))


def enter(listener: Listener, ticket: DataTicket) -> socket.socket:
    """A connection that has proved itself."""
    sock = call(listener)
    introduce(sock, ticket)
    return sock


@contextlib.contextmanager
def receiver(
    ticket: DataTicket, then: Callable[[socket.socket], None], host: str = "127.0.0.1"
) -> Iterator[Endpoint]:
    """A receiver that gave the ticket and does ``then`` with each connection."""

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = server.accept()
                with sock, contextlib.suppress(OSError, msgspec.MsgspecError):
                    hello = frames.hello_decoder.decode(hear(sock)[1])
                    nonce = new_nonce()
                    context = (hello.nonce, nonce, hello.level.encode())
                    proved = proof(ticket.key, "receiver", *context)
                    say(sock, Kind.CHALLENGE, frames.DataChallenge(nonce, proved))
                    then(sock)

    with socket.create_server((host, 0)) as server:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield Endpoint("tcp", host, server.getsockname()[1])
        server.shutdown(socket.SHUT_RDWR)
    thread.join(10)
