"""One control connection to one address of a receiver, asked step by step."""

from __future__ import annotations

import socket
import time
from typing import Final

import zmq
from zmq.utils.monitor import recv_monitor_message

from mlx_receiver.wire import codec
from mlx_receiver.wire import messages as m
from mlx_receiver.wire.addresses import Address
from mlx_receiver.wire.handshake import Introduction
from mlx_receiver.wire.keys import ClientKeys, guard_client

ANSWER_SECONDS: Final = 3.0

#: What the receiver's log calls this client.
NAME: Final = "mac-decode check"

#: The first 64 bytes on a ZeroMQ connection: signature, version 3.1, mechanism, as-server, filler.
_GREETING: Final = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
#: Signature and version: what a peer sends before it has seen the other's mechanism.
_SIGNATURE_BYTES: Final = 11


def speaks_zeromq(address: Address) -> bool:
    """Whether what listens there greets as ZeroMQ does. Raises OSError if nothing listens."""
    with socket.create_connection((address.host, address.sockaddr[1]), ANSWER_SECONDS) as sock:
        try:
            sock.sendall(_GREETING[:_SIGNATURE_BYTES])
            said = b""
            while len(said) < _SIGNATURE_BYTES and (more := sock.recv(64)):
                said += more
        except OSError:  # a timeout or a reset: it is something else
            return False
    return len(said) >= _SIGNATURE_BYTES and said[0] == 0xFF and said[9] & 1 == 1


class Conversation:
    """A context manager around the socket."""

    def __init__(self, address: Address, keys: ClientKeys) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._dealer = self._context.socket(zmq.DEALER)
        self._dealer.setsockopt(zmq.LINGER, 0)
        self._dealer.setsockopt(zmq.IPV6, 1)
        self._dealer.setsockopt(zmq.MAXMSGSIZE, m.MAX_MESSAGE_BYTES)
        guard_client(self._dealer, keys)
        self._monitor = self._dealer.get_monitor_socket()
        self._dealer.connect(f"tcp://{address.text}")

    def admitted(self) -> bool | None:
        """Whether the receiver accepts the keys; None when it says nothing in time."""
        until = time.monotonic() + ANSWER_SECONDS
        while (left := until - time.monotonic()) > 0:
            if self._monitor.poll(int(left * 1000) + 1):
                event = recv_monitor_message(self._monitor)["event"]
                if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    return True
                if event in (
                    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
                    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
                    zmq.EVENT_HANDSHAKE_FAILED_AUTH,
                ):
                    return False
        return None

    def hello(self, me: Introduction) -> m.ReceiverMessage | None:
        """The answer to a Hello, None without one. Raises WireError for what cannot be read."""
        self.send(me.hello())
        return self.receive(ANSWER_SECONDS)

    def send(self, message: m.ClientMessage) -> None:
        """Queue a message."""
        self._dealer.send(codec.encode(message))

    def receive(self, seconds: float) -> m.ReceiverMessage | None:
        """The next message, None when there is none in time. Raises WireError."""
        if not self._dealer.poll(int(seconds * 1000)):
            return None
        return codec.decode_receiver(self._dealer.recv())

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *_: object) -> None:
        self._dealer.disable_monitor()
        self._context.destroy(linger=0)
