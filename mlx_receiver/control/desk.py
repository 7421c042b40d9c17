"""Who may come in, and who this receiver is to others: the same with a model and without one."""

from __future__ import annotations

import secrets
import socket
from dataclasses import dataclass
from pathlib import Path

import msgspec

from mlx_receiver.control.credentials import Credentials, Paired, SharedToken
from mlx_receiver.discovery.announce import Announcer
from mlx_receiver.discovery.service import ANY_MODEL, Announced
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
        """Whether some machine is paired with it, or none has to be."""
        try:
            return self.reception is None or bool(self.keystore.peers())
        except PairingError:
            return False


class Presence:
    """Announces a receiver on the network until ``close``."""

    def __init__(
        self, desk: Desk, settings: Settings, port: int, http_port: int, model: str = ANY_MODEL
    ) -> None:
        """``model`` as vLLM calls it, or its folder, of which others hear the last name only."""
        card = desk.card
        self._desk = desk
        # Of a key that follows from a token one could guess the token.
        key = "" if settings.token else card.key
        self._said = Announced(
            protocol=card.protocol,
            instance=instance_of(key or secrets.token_hex(16)),
            name=card.name,
            model=Path(model).name if model.startswith(("/", "~", ".")) else model,
            paired=desk.is_paired,
            http_port=http_port,
            key=key,
        )
        self._announcer = Announcer(self._said, port, settings.host) if settings.discovery else None

    def refresh(self) -> None:
        """Say what has changed: machines are paired by other processes, too."""
        said = msgspec.structs.replace(self._said, paired=self._desk.is_paired)
        changed, self._said = said != self._said, said
        if changed and self._announcer is not None:
            self._announcer.update(said)

    def close(self) -> None:
        """Say goodbye."""
        if self._announcer is not None:
            self._announcer.close()
