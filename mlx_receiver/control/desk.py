"""Who may come in, and who this receiver is to others: the same with a model and without one."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from mlx_receiver.control.credentials import Credentials, Paired, SharedToken
from mlx_receiver.discovery.announce import Announcer
from mlx_receiver.discovery.service import Announced
from mlx_receiver.pairing.exchange import Card
from mlx_receiver.pairing.keystore import Keystore, PairingError, instance_of
from mlx_receiver.pairing.offer import Reception
from mlx_receiver.settings import Settings, SettingsError
from mlx_receiver.wire.keys import control_keys
from mlx_receiver.wire.messages import PROTOCOL_VERSION


@dataclass(frozen=True, slots=True)
class Desk:
    """``reception`` pairs; it is None where a token is the way in, or only this machine is."""

    credentials: Credentials
    card: Card
    keystore: Keystore
    reception: Reception | None

    @classmethod
    def of(cls, settings: Settings) -> Desk:
        """What the settings ask for. Raises SettingsError where the keys cannot be kept."""
        name, keystore = socket.gethostname(), Keystore("receiver")
        if not settings.pairs:
            public = control_keys(settings.token).receiver_public.decode()
            card = Card(PROTOCOL_VERSION, name, public)
            return cls(SharedToken(settings.token), card, keystore, None)
        try:
            identity = keystore.identity()
            keystore.peers()
        except PairingError as error:
            raise SettingsError(str(error)) from None
        card = Card(PROTOCOL_VERSION, name, identity.public)
        reception = Reception(keystore, identity, name)
        return cls(Paired(keystore, identity), card, keystore, reception)

    @property
    def is_paired(self) -> bool:
        """Whether some machine is paired with it."""
        try:
            return self.reception is not None and bool(self.keystore.peers())
        except PairingError:
            return False


def announcer(desk: Desk, host: str, port: int, http_port: int, model: str) -> Announcer:
    """Announces a receiver on the network; ``model`` is "any" while it has none."""
    card = desk.card
    return Announcer(
        Announced(
            protocol=card.protocol,
            instance=instance_of(card.key),
            name=card.name,
            model=model,
            paired=desk.is_paired,
            http_port=http_port,
            key=card.key,
        ),
        port,
        host,
    )
