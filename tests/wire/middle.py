"""Somebody on the way between a client and the receiver: hears everything and can say anything."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import msgspec

from mlx_receiver.transports.seal import TAG_BYTES
from mlx_receiver.transports.transport import Listener
from mlx_receiver.wire.frames import HEADER_BYTES, Header, Level, unpack
from mlx_receiver.wire.messages import Endpoint
from tests.wire.peers import read


class Middle:
    """Passes one connection's handshake on, its HELLO as ``hello`` changes it. What comes after it
    waits on either side until ``take`` has it; nothing goes on by itself."""

    def __init__(self, listener: Listener, hello: Callable[[bytes], bytes] = bytes) -> None:
        self._address = ("127.0.0.1", listener.endpoint.port)
        self._hello = hello
        self._server = socket.create_server(("127.0.0.1", 0))
        port = self._server.getsockname()[1]
        #: Where clients find it, who take it for the receiver.
        self.endpoint: Endpoint = msgspec.structs.replace(listener.endpoint, port=port)
        #: All that the client has said.
        self.recorded = b""
        self._waiting = {"client": bytearray(), "receiver": bytearray()}
        self._sockets: dict[str, socket.socket] = {}
        self._ended: set[str] = set()
        self._news = threading.Condition()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            client, _ = self._server.accept()
            receiver = socket.create_connection(self._address)
            for sock in (client, receiver):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets = {"client": client, "receiver": receiver}
            receiver.sendall(self._hello(self._note(_frame(client))))
            client.sendall(_frame(receiver))
            receiver.sendall(self._note(_frame(client)))
        for name in self._sockets:
            threading.Thread(target=self._hear, args=[name], daemon=True).start()

    def _note(self, data: bytes) -> bytes:
        self.recorded += data
        return data

    def _hear(self, name: str) -> None:
        with contextlib.suppress(OSError):
            while data := self._sockets[name].recv(1 << 16):
                with self._news:
                    if name == "client":
                        self._note(data)
                    self._waiting[name] += data
                    self._news.notify_all()
        with self._news:
            self._ended.add(name)
            self._news.notify_all()
        # Whoever is on the other side learns of it, as without somebody in the middle.
        for sock in self._sockets.values():
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def take(self, name: str, count: int) -> bytes:
        """The next bytes that one side says."""
        waiting = self._waiting[name]
        with self._news:
            assert self._news.wait_for(lambda: len(waiting) >= count, 20), len(waiting)
            data = bytes(waiting[:count])
            del waiting[:count]
        return data

    def tell(self, name: str, data: bytes) -> None:
        """Say something to one side."""
        with contextlib.suppress(OSError):  # it has hung up already
            self._sockets[name].sendall(data)

    def hang_up(self, name: str) -> None:
        """Nothing more comes to that side."""
        self._sockets[name].shutdown(socket.SHUT_WR)

    def hung_up(self, name: str, seconds: float = 5.0) -> bool:
        """Whether that side has closed its connection within the time."""
        with self._news:
            return self._news.wait_for(lambda: name in self._ended, seconds)

    def close(self) -> None:
        """Leave."""
        for sock in (self._server, *self._sockets.values()):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


def _frame(sock: socket.socket) -> bytes:
    """A frame of the handshake."""
    head = read(sock, HEADER_BYTES)
    return head + read(sock, unpack(head).payload_bytes)


def parts(header: Header, level: Level) -> tuple[int, int]:
    """How many bytes of a frame travel as its header and as its payload, with their tags."""
    tag = 0 if level == "clear" else TAG_BYTES
    payload = header.payload_bytes
    return HEADER_BYTES + tag, payload + tag if payload else 0


def quiet(seconds: float = 0.2) -> None:
    """Long enough for what comes through a thread to be there."""
    time.sleep(seconds)


@contextlib.contextmanager
def between(listener: Listener, hello: Callable[[bytes], bytes] = bytes) -> Iterator[Middle]:
    """A ``Middle`` that leaves at the end."""
    middle = Middle(listener, hello)
    try:
        yield middle
    finally:
        middle.close()
