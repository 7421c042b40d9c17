"""The exchange in which two machines prove that they were told the same one-time code (SPAKE2) and
give each other their public keys::

    guest (Spark)                               host (Mac)
    Greeting(message)                   ->
                                        <-      Answer(attempt, message, host's card, sealed)
    Closing(attempt, card sealed)       ->
                                        <-      (paired)

Whoever does not know the code learns nothing from it that helps to guess; each greeting costs the
host one of the tries that the code has. A card is sealed with a key that only the two ends of this
exchange have: that it opens is the proof.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from msgspec import Meta
from spake2 import SPAKE2_A, SPAKE2_B

from mlx_receiver.pairing.keystore import Key, PairingError, Peer
from mlx_receiver.wire.ranges import Name

_GUEST: Final = b"vllm-mac-decode guest"
_HOST: Final = b"vllm-mac-decode host"
#: A key seals one card, once.
_NONCE: Final = bytes(12)

_Message = Annotated[bytes, Meta(min_length=1, max_length=64)]
_Sealed = Annotated[bytes, Meta(min_length=16, max_length=2048)]
Attempt = Annotated[str, Meta(pattern=r"^[0-9a-f]{16}\Z")]


class Card(msgspec.Struct, frozen=True):
    """What a receiver says of itself to everybody: nothing of it is secret, or proves anything."""

    protocol: int
    name: Name
    key: Key


class Greeting(msgspec.Struct, frozen=True):
    """The guest's first word."""

    message: _Message


class Answer(msgspec.Struct, frozen=True):
    """The host's, with its card."""

    attempt: Attempt
    message: _Message
    card: _Sealed


class Closing(msgspec.Struct, frozen=True):
    """The guest's last word: its own card."""

    attempt: Attempt
    card: _Sealed


class Guest:
    """The side that was given the code."""

    def __init__(self, code: str) -> None:
        self._spake = SPAKE2_A(digits(code), idA=_GUEST, idB=_HOST)
        self._key = b""

    def greeting(self) -> Greeting:
        """The first message; once."""
        return Greeting(self._spake.start())

    def answered(self, answer: Answer) -> Peer:
        """The host. Raises PairingError when it was told another code."""
        self._key = _agreed(self._spake, answer.message)
        return _open(self._key, _HOST, answer.card)

    def closing(self, attempt: str, me: Peer) -> Closing:
        """The last message, after ``answered``."""
        return Closing(attempt, _seal(self._key, _GUEST, me))


class Host:
    """The side that shows the code."""

    def __init__(self, code: str) -> None:
        self._spake = SPAKE2_B(digits(code), idA=_GUEST, idB=_HOST)
        self._key = b""

    def answer(self, greeting: Greeting, attempt: str, me: Peer) -> Answer:
        """What to say to a greeting; once. Raises PairingError for one that is none."""
        message = self._spake.start()
        self._key = _agreed(self._spake, greeting.message)
        return Answer(attempt, message, _seal(self._key, _HOST, me))

    def closed(self, closing: Closing) -> Peer:
        """The guest. Raises PairingError when it was told another code."""
        return _open(self._key, _GUEST, closing.card)


def digits(code: str) -> bytes:
    """The code however it was typed: only its digits count."""
    return "".join(c for c in code if c in "0123456789").encode()


def _agreed(spake: SPAKE2_A | SPAKE2_B, message: bytes) -> bytes:
    try:
        return bytes(spake.finish(message))
    except Exception:  # the library has many for bytes that are no point of its curve
        raise PairingError("the other side does not speak this pairing") from None


def _seal(key: bytes, side: bytes, card: Peer) -> bytes:
    return AESGCM(_derived(key, side)).encrypt(_NONCE, msgspec.msgpack.encode(card), side)


def _open(key: bytes, side: bytes, sealed: bytes) -> Peer:
    try:
        card = AESGCM(_derived(key, side)).decrypt(_NONCE, sealed, side)
        return msgspec.msgpack.decode(card, type=Peer)
    except InvalidTag:
        raise PairingError("wrong code") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise PairingError(f"the other side's card cannot be read: {error}") from None


def _derived(key: bytes, side: bytes) -> bytes:
    return HKDF(SHA256(), 32, salt=None, info=side).derive(key)
