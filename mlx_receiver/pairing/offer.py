"""The Mac's side of pairing: a one-time code, the tries that it has, and who has shown it.

The code lies in the keystore's folder, so that ``mlx-receiver pair`` can make one while the
receiver runs: whoever may read that folder is the user.
"""

from __future__ import annotations

import secrets
import threading
import time
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from mlx_receiver.pairing.exchange import Answer, Closing, Greeting, Host
from mlx_receiver.pairing.keystore import Identity, Keystore, PairingError, Peer

#: Digits of a code.
_DIGITS: Final = 8
#: Seconds for which a code counts, and wrong ones after which it does not.
OFFER_SECONDS: Final = 600.0
TRIES: Final = 3
#: Seconds that a guest may take between its two messages.
_ATTEMPT_SECONDS: Final = 30.0
_FILE: Final = "offer.json"


class Offer(msgspec.Struct, frozen=True):
    """The content of ``offer.json``. ``until`` in seconds of the system's clock."""

    code: Annotated[str, Meta(pattern=r"^[0-9]{8}\Z")]
    until: float
    tries: int

    @property
    def shown(self) -> str:
        """For people: two groups of digits."""
        return f"{self.code[:4]}-{self.code[4:]}"


def new_offer(keystore: Keystore) -> Offer:
    """A code; an earlier one does not count any more. Raises PairingError."""
    code = "".join(secrets.choice("0123456789") for _ in range(_DIGITS))
    offer = Offer(code, time.time() + OFFER_SECONDS, TRIES)
    with keystore.locked():
        keystore.write(_FILE, offer)
    return offer


def standing(keystore: Keystore) -> Offer | None:
    """The code that counts now. Raises PairingError."""
    offer = keystore.read(_FILE, Offer)
    if offer is None or offer.tries <= 0 or not 0 < offer.until - time.time() <= OFFER_SECONDS:
        return None
    return offer


class Reception:
    """Answers guests. For any thread."""

    def __init__(self, keystore: Keystore, identity: Identity, name: str) -> None:
        self._keystore = keystore
        self._me = Peer(name, identity.public)
        self._lock = threading.Lock()
        #: By number: the exchange, the code it is about, and until when it may be closed.
        self._attempts: dict[str, tuple[Host, str, float]] = {}

    def greet(self, greeting: Greeting) -> Answer:
        """One try of the code. Raises PairingError when there is none, or none is left."""
        with self._keystore.locked():
            offer = standing(self._keystore)
            if offer is None:
                raise PairingError(
                    "this receiver shows no code at present: run `mlx-receiver pair` on its machine"
                )
            # Taken before the answer: it must not matter how the guest goes on.
            left = msgspec.structs.replace(offer, tries=offer.tries - 1)
            self._keystore.write(_FILE, left)
        host = Host(offer.code)
        attempt = secrets.token_hex(8)
        answer = host.answer(greeting, attempt, self._me)
        now = time.monotonic()
        with self._lock:
            self._attempts = {n: kept for n, kept in self._attempts.items() if kept[2] > now}
            self._attempts[attempt] = host, offer.code, now + _ATTEMPT_SECONDS
        return answer

    def close(self, closing: Closing) -> Peer:
        """Pair with the guest, and take the code back. Raises PairingError."""
        with self._lock:
            host, code, until = self._attempts.pop(closing.attempt, (None, "", 0.0))
        if host is None or until < time.monotonic():
            raise PairingError("that pairing is over: begin again")
        guest = host.closed(closing)
        with self._keystore.locked():
            offer = self._keystore.read(_FILE, Offer)
            if offer is None or offer.code != code:
                raise PairingError("the code is used, or another one is shown by now")
            # In this order: who waits for the code to be used finds the pairing.
            self._keystore.put(guest)
            self._keystore.delete(_FILE)
        return guest
