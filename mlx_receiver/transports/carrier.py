"""How the payloads of an accepted connection arrive, and the way back to its client."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Sequence
from typing import Protocol

import msgspec

from mlx_receiver.transports.data_socket import recv_payload
from mlx_receiver.transports.seal import Opener, Sealer
from mlx_receiver.wire.frames import DataReply, Header, Kind


class BackChannel:
    """The way back to one client, for any thread; nobody ever waits in it."""

    def __init__(self, sock: socket.socket, sealer: Sealer) -> None:
        self._sock = sock
        self._sealer = sealer
        self._lock = threading.Lock()

    def post(self, kind: Kind, session: int = 0, body: bytes = b"") -> None:
        """Send a frame; a client that does not read it loses its connection."""
        header = Header(kind=kind, session=session, payload_bytes=len(body)).pack()
        with self._lock, contextlib.suppress(OSError):
            # Under the lock: frames must leave in the order in which they were numbered.
            frame = self._sealer.small(header, body)
            try:
                whole = self._sock.send(frame, socket.MSG_DONTWAIT) == len(frame)
            except OSError:
                whole = False
            if not whole:
                self._sock.shutdown(socket.SHUT_RDWR)

    def reply(self, message: DataReply) -> None:
        """Send a REPLY."""
        self.post(Kind.REPLY, message.session, msgspec.msgpack.encode(message))


class Carrier(Protocol):
    """How the payloads of one accepted connection arrive."""

    def fill(self, header: Header, buffers: Sequence[memoryview], wanted: bool) -> None:
        """Write the block's payload into the buffers, where it is whole and right when this
        returns; whatever comes is right if it is not ``wanted``.

        Raises TransportError, also when the connection is shut down meanwhile.
        """

    def close(self) -> None:
        """The connection is over."""


class InBand:
    """See ``Carrier``: payloads that follow their headers on the connection itself."""

    def __init__(self, sock: socket.socket, back: BackChannel, opener: Opener) -> None:
        self._sock = sock
        self._opener = opener
        self._tag = memoryview(bytearray(opener.tag_bytes))

    def fill(self, header: Header, buffers: Sequence[memoryview], wanted: bool) -> None:
        if not header.payload_bytes:
            return  # nor is there a tag
        recv_payload(self._sock, [*buffers, self._tag])
        if wanted:
            self._opener.payload(buffers, self._tag)
        else:
            self._opener.skip()

    def close(self) -> None:
        """See ``Carrier.close``."""
