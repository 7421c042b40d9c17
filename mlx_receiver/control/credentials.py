"""Whose connections the control port takes: those of a token's holders, or of paired machines."""

from __future__ import annotations

import hmac
import logging
from typing import Protocol

from mlx_receiver.pairing.keystore import Identity, Keystore, PairingError
from mlx_receiver.wire import keys
from mlx_receiver.wire.addresses import is_this_machine

logger = logging.getLogger(__name__)


class Credentials(Protocol):
    """Who may connect. Called from the authenticating thread and from the control thread."""

    #: The receiver's own secret CURVE key, in Z85.
    secret: bytes

    def allows(self, key: bytes, address: str) -> bool:
        """Whether the owner of this public key (Z85) may come from that address, now."""


class SharedToken:
    """See ``Credentials``: everybody who has the token; without one, where only this machine can
    connect, everybody."""

    def __init__(self, token: str) -> None:
        pair = keys.control_keys(token)
        self.secret = pair.receiver_secret
        self._client = pair.client_public

    def allows(self, key: bytes, address: str) -> bool:
        return hmac.compare_digest(key, self._client)


class Paired:
    """See ``Credentials``: machines that are paired with this one, and this one itself."""

    def __init__(self, keystore: Keystore, identity: Identity) -> None:
        self.secret = identity.secret.encode()
        self._keystore = keystore
        self._complaint = ""

    def allows(self, key: bytes, address: str) -> bool:
        if is_this_machine(address):
            return True
        try:
            known = [peer.key.encode() for peer in self._keystore.peers()]
        except PairingError as error:
            if str(error) != self._complaint:
                self._complaint = str(error)
                logger.error("nobody can connect: %s", error)
            return False
        return any([hmac.compare_digest(key, other) for other in known])
