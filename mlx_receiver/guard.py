"""Who may connect to the control port: only a peer that holds the keys."""

from __future__ import annotations

import hmac
from typing import Final

import zmq
from zmq.auth.thread import ThreadAuthenticator

from mlx_receiver.wire import keys

#: Milliseconds in which a connection must have shown its key.
_HANDSHAKE_MS: Final = 5000


class Guard:
    """Authenticates the connections of a ROUTER with the keys that follow from the token."""

    def __init__(self, socket: zmq.Socket[bytes], token: str) -> None:
        """Before ``socket`` is bound."""
        pair = keys.control_keys(token)
        self._client_key = pair.client_public
        self._authenticator = ThreadAuthenticator(socket.context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(credentials_provider=self)
        socket.curve_server = True
        socket.curve_secretkey = pair.receiver_secret
        socket.handshake_ivl = _HANDSHAKE_MS

    def callback(self, _domain: str, key: bytes) -> bool:
        """Whether ``key``, of which its owner has shown that it is its own, is the clients'."""
        return hmac.compare_digest(key, self._client_key)

    def close(self) -> None:
        """Stop the authenticating thread; after the socket is closed, before its context ends."""
        self._authenticator.stop()
