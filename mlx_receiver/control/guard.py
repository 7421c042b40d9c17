"""Who may connect to the control port, and how many may try."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from typing import Final

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import parse_monitor_message

from mlx_receiver.control.credentials import Credentials

#: Milliseconds in which a connection must have shown its key.
_HANDSHAKE_MS: Final = 5000

#: Connections at once that are no client's: strangers, and those that have not said Hello yet.
MAX_STRANGERS: Final = 64


class Guard:
    """Authenticates the connections of a ROUTER by their keys, and closes the oldest stranger's
    where there are too many."""

    def __init__(self, router: zmq.Socket[bytes], credentials: Credentials) -> None:
        """Before ``router`` is bound."""
        self._credentials = credentials
        self._authenticator = _Authenticator(router.context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(credentials_provider=self)
        router.curve_server = True
        router.curve_secretkey = credentials.secret
        router.handshake_ivl = _HANDSHAKE_MS
        self._router = router
        #: Readable when connections have come or gone.
        self.events = router.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        #: By descriptor, the oldest first: whose connection it is.
        self._strangers: dict[int, _Address] = {}
        self._clients: set[int] = set()

    def callback(self, _domain: str, key: bytes) -> bool:
        """Whether ``key``, of which its owner has shown that it is its own, is a client's."""
        return self._credentials.allows(key, self._authenticator.address)

    def watch(self, gone: Callable[[int], None]) -> None:
        """Follow what has happened; ``gone`` is told of each client's connection that has ended.

        Events come in order and before the messages of a connection, so that a descriptor means
        the connection that has it now.
        """
        while True:
            try:
                frames = self.events.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            event = parse_monitor_message(frames)
            descriptor = int(event["value"])
            if event["event"] == zmq.EVENT_ACCEPTED:
                self._strangers[descriptor] = _addresses(descriptor)
                if len(self._strangers) > MAX_STRANGERS:
                    oldest = next(iter(self._strangers))
                    _shut_down(oldest, self._strangers.pop(oldest))
            elif descriptor in self._clients:
                self._clients.discard(descriptor)
                gone(descriptor)
            else:
                self._strangers.pop(descriptor, None)

    def welcome(self, descriptor: int) -> None:
        """The connection is a client's from now on."""
        self._strangers.pop(descriptor, None)
        self._clients.add(descriptor)

    def dismiss(self, descriptor: int) -> None:
        """It is no client's any more, if it still exists."""
        if descriptor in self._clients:
            self._clients.discard(descriptor)
            self._strangers[descriptor] = _addresses(descriptor)

    def close(self) -> None:
        """Close the socket and stop the authenticating thread; before the context ends."""
        self._router.disable_monitor()
        self.events.close()
        self._router.close()
        self._authenticator.stop()


class _Authenticator(ThreadAuthenticator):
    """Also knows where the connection comes from about which a provider is asked."""

    address = ""

    async def handle_zap_message(self, msg: list[bytes]) -> None:
        """One at a time: see ZeroMQ's RFC 27 for the frames."""
        self.address = msg[3].decode(errors="replace") if len(msg) > 3 else ""
        await super().handle_zap_message(msg)


#: Both ends of a connection, None where it has ended.
_Address = tuple[object, object] | None


def _addresses(descriptor: int) -> _Address:
    try:
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            return connection.getsockname(), connection.getpeername()
    except OSError:
        return None


def _shut_down(descriptor: int, address: _Address) -> None:
    """End a connection that libzmq owns, unless its descriptor is another's by now."""
    if address is None or _addresses(descriptor) != address:
        return
    with (
        contextlib.suppress(OSError),
        socket.socket(fileno=os.dup(descriptor)) as connection,
    ):
        connection.shutdown(socket.SHUT_RDWR)
