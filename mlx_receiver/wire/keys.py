"""Who may connect: keys from the token for the control channel, proofs for the data channel.

Control is ZeroMQ with CURVE. Both sides derive both key pairs from the token, so that a peer
without it cannot finish the handshake, in either direction, and the token itself never travels.
Trying tokens costs a scrypt each.

``Welcome`` gives each client a ticket of its own, over the encrypted control channel; both ends of
a data connection then prove that they know its key, the receiver first::

    client                                      receiver
    HELLO(client, nonce, level)         ->
                                        <-      CHALLENGE(nonce, proof)
    PROOF(proof)                        ->

Proofs cover both nonces and the level. What follows is protected as the level says, with keys that
come from the ticket's and the nonces (``transports/seal.py``).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from functools import cache
from typing import Final

import zmq
from zmq.utils import z85

from mlx_receiver.wire.messages import DataTicket

NONCE_BYTES: Final = 32

#: The same in every version, so that versions which differ can tell each other.
_SALT: Final = b"vllm-mac-decode control channel"
#: 16 MiB and some 50 ms, once a process.
_SCRYPT: Final = {"n": 1 << 14, "r": 8, "p": 1}


@dataclass(frozen=True, slots=True)
class Keys:
    """Both sides' CURVE key pairs, in ZeroMQ's Z85 form."""

    receiver_public: bytes
    receiver_secret: bytes
    client_public: bytes
    client_secret: bytes


@cache
def control_keys(token: str) -> Keys:
    """The control channel's keys for a token; an empty one, where only this machine can connect,
    gives keys that everyone knows."""
    seed = hashlib.scrypt(token.encode(), salt=_SALT, dklen=64, **_SCRYPT)
    receiver, client = z85.encode(seed[:32]), z85.encode(seed[32:])
    return Keys(zmq.curve_public(receiver), receiver, zmq.curve_public(client), client)


@dataclass(frozen=True, slots=True)
class ClientKeys:
    """What a client shows, and whom it expects: CURVE keys in ZeroMQ's Z85 form."""

    receiver_public: bytes
    public: bytes
    secret: bytes


def of_token(token: str) -> ClientKeys:
    """A client's keys for a token."""
    keys = control_keys(token)
    return ClientKeys(keys.receiver_public, keys.client_public, keys.client_secret)


def guard_client(socket: zmq.Socket[bytes], keys: ClientKeys) -> None:
    """Have a DEALER talk to that receiver only; before ``connect``."""
    socket.curve_serverkey = keys.receiver_public
    socket.curve_publickey = keys.public
    socket.curve_secretkey = keys.secret


def new_ticket() -> DataTicket:
    """A ticket that nobody else has."""
    return DataTicket(secrets.token_hex(16), secrets.token_bytes(32))


def new_nonce() -> bytes:
    """NONCE_BYTES that were never used before."""
    return secrets.token_bytes(NONCE_BYTES)


def proof(key: bytes, side: str, *context: bytes) -> bytes:
    """What only a holder of ``key`` can say: ``side`` is who says it ("receiver" or "client"),
    ``context`` what was exchanged before, so that a proof counts once."""
    digest = hmac.new(key, side.encode(), hashlib.sha256)
    for part in context:
        digest.update(len(part).to_bytes(4, "little") + part)
    return digest.digest()


def proves(given: bytes, key: bytes, side: str, *context: bytes) -> bool:
    """Whether ``given`` is that proof; takes as long for a wrong one."""
    return hmac.compare_digest(given, proof(key, side, *context))
