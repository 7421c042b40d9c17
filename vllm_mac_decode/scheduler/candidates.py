"""Which receivers there may be, the ways to each, and the keys that it may want."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Final, Protocol

from mlx_receiver.discovery.browse import Browser, Found
from mlx_receiver.pairing.keystore import Identity, Keystore, PairingError
from mlx_receiver.wire import keys
from mlx_receiver.wire.addresses import is_this_machine, resolve, spelled
from mlx_receiver.wire.seldom import printable
from vllm_mac_decode.settings import DEFAULT_PORT, Settings

logger = logging.getLogger("vllm.mac_decode.link")

#: Seconds in which receivers may answer before the first attempt.
_FIRST_SECONDS: Final = 2.0

_HERE: Final = "127.0.0.1"
#: The receiver that may run here without being found.
LOCAL: Final = spelled(_HERE, DEFAULT_PORT)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A control port, and the keys to be used there. ``name`` is for messages."""

    name: str
    host: str
    port: int
    keys: keys.ClientKeys


class Candidates(Protocol):
    """Where to look for receivers."""

    def receivers(self) -> list[str]:
        """A name for each receiver that there may be, which tells it from the others; nothing is
        resolved. Raises PairingError."""

    def ways(self, receiver: str) -> list[Candidate]:
        """How to get to that one, the best way first. Raises PairingError."""

    def hosts(self, candidate: Candidate) -> list[str]:
        """All addresses that are known of that receiver."""

    def none(self) -> str:
        """What to say, and to do, when there is none."""

    def close(self) -> None:
        """Stop looking."""


def candidates(settings: Settings) -> Candidates:
    """What the settings ask for: the addresses that are given, or whoever is found."""
    return Typed(settings) if settings.receiver else Discovered(settings)


class Typed:
    """See ``Candidates``: the receivers whose addresses were given."""

    def __init__(self, settings: Settings) -> None:
        self._token = settings.token
        self._addresses = settings.addresses()
        self._keystore = Keystore("vllm")

    def receivers(self) -> list[str]:
        return list(self._addresses)

    def ways(self, receiver: str) -> list[Candidate]:
        host, port = self._addresses[receiver]
        known = keys_for(host, port, self._token, self._keystore)
        if not known:
            raise PairingError(
                "this machine is paired with no receiver: run `mac-decode pair CODE --receiver "
                f"{receiver}` with the code that `mlx-receiver pair` shows on the Mac, or give "
                "both sides one token"
            )
        return [Candidate(receiver, host, port, keys) for keys in known]

    def hosts(self, candidate: Candidate) -> list[str]:
        try:
            return [address.host for address in resolve(candidate.host, candidate.port)]
        except (OSError, UnicodeError):
            return []

    def none(self) -> str:
        return f"no receiver answers at {', '.join(self._addresses)}"

    def close(self) -> None:
        """See ``Candidates.close``."""


class Discovered:
    """See ``Candidates``: receivers that announce themselves on the network, and the one that may
    run here."""

    def __init__(self, settings: Settings) -> None:
        self._token = settings.token
        self._keystore = Keystore("vllm")
        self._browser = Browser() if settings.discovery else None
        self._looked = False

    def receivers(self) -> list[str]:
        if not self._looked:
            # Else the first words in the log would be that there is none.
            self._looked = True
            self.wait(_FIRST_SECONDS)
        announced = self._announced()
        here = any(
            (way.host, way.port) == (_HERE, DEFAULT_PORT)
            for ways in announced.values()
            for way in ways
        )
        return [*announced, *([] if here else [LOCAL])]

    def ways(self, receiver: str) -> list[Candidate]:
        return self._here() if receiver == LOCAL else self._announced().get(receiver, [])

    def hosts(self, candidate: Candidate) -> list[str]:
        for service in self._found():
            hosts = [way.host for way in service.addresses]
            if service.port == candidate.port and candidate.host in hosts:
                return hosts
        return []

    def wait(self, seconds: float) -> None:
        """Until some receiver is found, or that long."""
        if self._browser is not None:
            self._browser.wait(seconds)

    def _found(self) -> list[Found]:
        return self._browser.found() if self._browser is not None else []

    def _announced(self) -> dict[str, list[Candidate]]:
        """The ways to those that take this machine."""
        paired, local = {peer.key for peer in self._keystore.peers()}, _local_key()
        found: dict[str, list[Candidate]] = {}
        for service in self._found():
            here = _is_here(service, local)
            known = self._keys_of(service, paired, here)
            if known is None:
                continue
            said = service.announced
            ways = [way.host for way in service.addresses]
            found[f"{said.instance}:{service.port}:{said.key}"] = [
                Candidate(
                    f"{printable(said.name)} ({spelled(host, service.port)})",
                    host,
                    service.port,
                    known,
                )
                for host in ([_HERE, *ways] if here else ways)
            ]
        return found

    def _here(self) -> list[Candidate]:
        """Multicast may be blocked, and a receiver on this machine needs none to be found."""
        return [
            Candidate(LOCAL, _HERE, DEFAULT_PORT, known)
            for known in keys_for(_HERE, DEFAULT_PORT, self._token, self._keystore)
        ]

    def _keys_of(self, service: Found, paired: set[str], here: bool) -> keys.ClientKeys | None:
        if self._token:
            return keys.of_token(self._token)
        key = service.announced.key
        if here and key == keys.of_token("").receiver_public.decode():
            return keys.of_token("")
        if here or key in paired:
            return _own(self._keystore.identity(), key)
        return None

    def none(self) -> str:
        others = [] if self._token else [printable(s.announced.name) for s in self._found()]
        if others:
            return (
                f"{', '.join(sorted(set(others)))}: found, but not paired with this machine. Run "
                "`mac-decode pair CODE` with the code that `mlx-receiver pair` shows there"
            )
        return (
            "no receiver is found on this network: run `mlx-receiver start` on the Mac, or name "
            "its address with --mac-decode-receiver where multicast is blocked"
        )

    def close(self) -> None:
        if self._browser is not None:
            self._browser.close()


def keys_for(host: str, port: int, token: str, keystore: Keystore) -> list[keys.ClientKeys]:
    """The keys that the receiver at that address may want, the likeliest first.

    Raises PairingError.
    """
    if token:
        return [keys.of_token(token)]
    at = spelled(host, port)
    peers = sorted(keystore.peers(), key=lambda peer: (peer.address != at, -peer.since))
    receivers = [peer.key for peer in peers]
    here = _leads_here(host, port)
    if here:
        # This user's own one takes its machine without a pairing.
        receivers = [*filter(None, [_local_key()]), *receivers]
    me = keystore.identity() if receivers else None
    found = [_own(me, key) for key in dict.fromkeys(receivers) if me is not None]
    return [keys.of_token(""), *found] if here else found


def known_keys(keystore: Keystore) -> set[str]:
    """Of the receivers that take this machine: those it is paired with, and those that run here.

    Raises PairingError.
    """
    here = {keys.of_token("").receiver_public.decode(), _local_key()}
    return {peer.key for peer in keystore.peers()} | here - {""}


def _local_key() -> str:
    """Of this user's own receiver, "" where there was never one. Raises PairingError."""
    local = Keystore("receiver").read("identity.json", Identity)
    return local.public if local is not None else ""


def _leads_here(host: str, port: int) -> bool:
    """Whether all that the name leads to is this machine: the keys that everybody knows are good
    for that only."""
    try:
        return all(is_this_machine(address.host) for address in resolve(host, port))
    except (OSError, UnicodeError):
        return False


def _is_here(service: Found, local: str) -> bool:
    """Whether a receiver runs on this machine: it has this user's key, or is announced nowhere
    else."""
    if local and service.announced.key == local:
        return True
    return bool(service.addresses) and all(is_this_machine(w.host) for w in service.addresses)


def _own(me: Identity, receiver: str) -> keys.ClientKeys:
    return keys.ClientKeys(receiver.encode(), me.public.encode(), me.secret.encode())
