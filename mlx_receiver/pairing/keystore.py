"""What a machine keeps of its pairings: its own key pair, and the public keys of its peers.

Everything lies in one folder of the user's (0700, files 0600). Commands and running servers share
it: whoever changes it holds a lock, and readers look again when a file has changed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final, Literal, TypeVar

import msgspec
import platformdirs
import zmq
from msgspec import Meta

from mlx_receiver.files import write_whole
from mlx_receiver.wire.ranges import Name

#: Where the folder is, if not where the system keeps a user's data.
STATE_VARIABLE: Final = "MAC_DECODE_STATE_DIR"

_APPLICATION: Final = "vllm-mac-decode"

#: A CURVE key in Z85.
Key = Annotated[str, Meta(min_length=40, max_length=40, pattern=r"^[!-~]{40}\Z")]
#: Who somebody is: the beginning of the hash of the public key.
Instance = Annotated[str, Meta(pattern=r"^[0-9a-f]{16}\Z")]

Side = Literal["receiver", "vllm"]

_Struct = TypeVar("_Struct", bound=msgspec.Struct)


class PairingError(Exception):
    """A pairing, or what is kept of it, cannot be used; the text says why and what to do."""


class Identity(msgspec.Struct, frozen=True):
    """This machine's own key pair."""

    secret: Key

    @property
    def public(self) -> str:
        """What others may know."""
        return zmq.curve_public(self.secret.encode()).decode()

    @property
    def instance(self) -> str:
        """See ``instance_of``."""
        return instance_of(self.public)


class Peer(msgspec.Struct, frozen=True):
    """A machine whose key is known. ``name`` is what it calls itself; ``since`` in seconds of the
    system's clock; ``address`` is where a receiver was paired with, ``host:port``."""

    name: Name
    key: Key
    since: float = 0.0
    address: Annotated[str, Meta(max_length=300)] = ""

    @property
    def instance(self) -> str:
        """See ``instance_of``."""
        return instance_of(self.key)


class Pairings(msgspec.Struct, frozen=True):
    """The content of ``pairings.json``."""

    peers: Annotated[list[Peer], Meta(max_length=1024)] = []


def instance_of(key: str) -> str:
    """A short name for a key's owner, the same for everybody."""
    return hashlib.sha256(key.encode()).hexdigest()[:16]


class Keystore:
    """One side's folder: ``receiver`` on the Mac, ``vllm`` on the Spark. For any thread."""

    def __init__(self, side: Side) -> None:
        base = os.environ.get(STATE_VARIABLE) or platformdirs.user_data_path(_APPLICATION)
        self.folder = Path(base) / side
        self._read: tuple[tuple[int, int, int] | None, Pairings] = (None, Pairings())

    def identity(self) -> Identity:
        """This machine's keys, made the first time. Raises PairingError."""
        found = self._load("identity.json", Identity)
        if found is not None:
            return found
        with self.locked():
            found = self._load("identity.json", Identity)
            if found is None:
                _, secret = zmq.curve_keypair()
                found = Identity(secret.decode())
                self.write("identity.json", found)
        return found

    def peers(self) -> list[Peer]:
        """Who is paired, the oldest first; cheap while nothing has changed. Raises PairingError."""
        try:
            status = (self.folder / "pairings.json").stat()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._unusable("pairings.json", error) from None
        version = status.st_ino, status.st_mtime_ns, status.st_size
        if version != self._read[0]:
            self._read = version, self._load("pairings.json", Pairings) or Pairings()
        return list(self._read[1].peers)

    def add(self, peer: Peer) -> None:
        """Remember a peer; one of the same key is replaced. Raises PairingError."""
        with self.locked():
            self.put(peer)

    def put(self, peer: Peer) -> None:
        """``add``, with the lock."""
        peer = msgspec.structs.replace(peer, since=time.time())
        others = [other for other in self.peers() if other.key != peer.key]
        self.write("pairings.json", Pairings([*others, peer]))

    def remove(self, name: str) -> list[Peer]:
        """Forget those of that name, or whose instance begins so ("*": all); returns them.

        Raises PairingError.
        """
        with self.locked():
            peers = self.peers()
            gone = [
                peer
                for peer in peers
                if name in ("*", peer.name) or (len(name) >= 4 and peer.instance.startswith(name))
            ]
            if gone:
                self.write("pairings.json", Pairings([p for p in peers if p not in gone]))
        return gone

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else changes the folder meanwhile. Raises PairingError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = os.open(self.folder / "lock", os.O_CREAT | os.O_RDWR, 0o600)
        except OSError as error:
            raise self._unusable("", error) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def read(self, name: str, kind: type[_Struct]) -> _Struct | None:
        """A file's content, None where there is none or it is none. Raises PairingError."""
        with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):
            return self._decoded(name, kind)
        return None

    def write(self, name: str, content: msgspec.Struct) -> None:
        """With the lock. Whole or not at all. Raises PairingError."""
        try:
            write_whole(self.folder / name, msgspec.json.format(msgspec.json.encode(content)))
        except OSError as error:
            raise self._unusable(name, error) from None

    def delete(self, name: str) -> None:
        """With the lock."""
        with contextlib.suppress(OSError):
            (self.folder / name).unlink()

    def _load(self, name: str, kind: type[_Struct]) -> _Struct | None:
        try:
            return self._decoded(name, kind)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise PairingError(
                f"{self.folder / name} is damaged ({error}): delete it, and pair again"
            ) from None

    def _decoded(self, name: str, kind: type[_Struct]) -> _Struct | None:
        path = self.folder / name
        try:
            if path.stat().st_mode & 0o077:
                path.chmod(0o600)  # a copy, or a backup that was restored
            return msgspec.json.decode(path.read_bytes(), type=kind)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unusable(name, error) from None

    def _unusable(self, name: str, error: OSError) -> PairingError:
        where = self.folder / name if name else self.folder
        return PairingError(
            f"{where} cannot be used ({error.strerror}): make it this user's, or name another "
            f"folder with {STATE_VARIABLE}"
        )
