"""How a ``tcp`` data connection is protected, frame by frame.

Both ends derive a key for each direction from the ticket's key and the two nonces of the handshake
(HKDF-SHA256), so every connection has keys of its own. A sealed frame is::

    header  tag          AES-256-GCM, by itself: nothing in it is used before its tag is right
    [payload  tag]       if there is a payload

Each of the two has the next number of its direction as nonce, and no number travels: what was
lost, repeated, swapped, cut off, made up, or comes from another connection meets another number or
key, and its tag is wrong. A wrong tag ends the connection. The same holds for ``signed``, where the
bytes stay readable; ``clear`` has neither tags nor keys.

One key may do all of a connection's life: after 80 TB, a day at 1 GB/s, what GCM's proof leaves to
somebody who tells it from random bytes is 2**-44.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import GCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from mlx_receiver.transports.transport import TransportError
from mlx_receiver.wire.addresses import is_this_machine
from mlx_receiver.wire.frames import HEADER_BYTES, Level
from mlx_receiver.wire.messages import E_CREDENTIALS, Endpoint, WireError

Side = Literal["client", "receiver"]

TAG_BYTES: Final = 16

#: Payload bytes that are sealed, then sent, before the next are: few enough to be in the
#: processor's cache still when the kernel copies them, and so many because each call gives the GIL
#: up. On two cores 1 and 2 MiB differ by less than two runs do; beside a busy thread 2 MiB lose
#: less than smaller ones.
CHUNK_BYTES: Final = 2 << 20

_KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12

# --- which level ----------------------------------------------------------------------------


def level_for(host: str, endpoint: Endpoint) -> Level:
    """How a client protects a connection to that numeric address."""
    if is_this_machine(host):
        return "clear"
    return "signed" if endpoint.plain else "sealed"


def bare_level_for(host: str, endpoint: Endpoint) -> Level:
    """The same for a transport that cannot encrypt its payloads.

    Raises TransportError where they would be readable and nobody has agreed to that.
    """
    level = level_for(host, endpoint)
    if level == "sealed":
        raise TransportError(
            f"the {endpoint.transport} transport cannot encrypt KV, and {host} is another machine: "
            "use the tcp transport (MAC_DECODE_TRANSPORT=tcp), or allow it on both sides "
            "(MAC_DECODE_PLAIN_DATA=1 and mlx-receiver start --plain-data)"
        )
    return level


def check_level(level: Level, host: str, plain: bool) -> None:
    """Whether a receiver takes connections of that level from that address; ``plain`` is its own
    ``Endpoint.plain``. Raises WireError (``credentials``)."""
    if level == "sealed" or is_this_machine(host) or (level == "signed" and plain):
        return
    wanted = "--plain-data is not set here"
    if level == "clear":
        wanted = "has the other side connected to a loopback address that is passed on to here?"
    raise WireError(E_CREDENTIALS, f"its blocks would come {level} from {host}: {wanted}")


# --- keys and numbers -----------------------------------------------------------------------


class _Numbered:
    """One direction's key, and how many nonces it has been used with. For one thread at a time."""

    def __init__(self, key: bytes) -> None:
        self._whole = AESGCM(key)
        self._key = AES(key)
        self._used = 0

    def nonce(self) -> bytes:
        """The next one; none comes twice."""
        number, self._used = self._used, self._used + 1
        return number.to_bytes(_NONCE_BYTES, "big")

    def stream(self) -> Cipher[GCM]:
        """A cipher with the next nonce, for what is sealed or opened in pieces."""
        return Cipher(self._key, GCM(self.nonce()))

    def seal(self, level: Level, data: bytes) -> bytes:
        """A small text with its tag."""
        if level == "signed":
            return data + self._whole.encrypt(self.nonce(), b"", data)
        return self._whole.encrypt(self.nonce(), data, None)

    def open(self, level: Level, data: bytes) -> bytes:
        """The small text. Raises InvalidTag."""
        if level == "signed":
            text = data[:-TAG_BYTES]
            self._whole.decrypt(self.nonce(), data[-TAG_BYTES:], text)
            return text
        return self._whole.decrypt(self.nonce(), data, None)


def _numbered(level: Level, ticket_key: bytes, nonces: bytes, sender: Side) -> _Numbered | None:
    if level == "clear":
        return None
    info = f"vllm-mac-decode data channel, {level}, from {sender}"
    key = HKDF(SHA256(), _KEY_BYTES, salt=nonces, info=info.encode()).derive(ticket_key)
    return _Numbered(key)


# --- both ends of a direction ---------------------------------------------------------------


class Sealer:
    """What one side says on a connection. For one thread at a time."""

    def __init__(self, level: Level, ticket_key: bytes, nonces: bytes, me: Side) -> None:
        """``nonces`` are the client's and the receiver's, joined."""
        self._level = level
        self._numbered = _numbered(level, ticket_key, nonces, me)
        self._scratch: memoryview | None = None

    def small(self, header: bytes, body: bytes = b"") -> bytes:
        """A whole frame whose payload is small."""
        if self._numbered is None:
            return header + body
        sealed = self._numbered.seal(self._level, header)
        return sealed + self._numbered.seal(self._level, body) if body else sealed

    def frame(self, header: bytes, payload: Sequence[memoryview]) -> Iterator[list[memoryview]]:
        """What to send for a frame, a chunk at a time: it must be sent before the next is asked
        for, which may be written in the same place. The payload itself is only read."""
        if self._numbered is None:
            yield [memoryview(header), *payload]
            return
        todo = [memoryview(self._numbered.seal(self._level, header))]
        if not any(part.nbytes for part in payload):
            yield todo
            return
        cipher, done = self._numbered.stream().encryptor(), 0
        for part in payload:
            while part.nbytes:
                piece = part[: CHUNK_BYTES - done]
                part = part[piece.nbytes :]
                if self._level == "sealed":
                    place = self._place(done, piece.nbytes)
                    cipher.update_into(piece, place)
                    todo.append(place)
                else:
                    cipher.authenticate_additional_data(piece)
                    todo.append(piece)
                done += piece.nbytes
                if done == CHUNK_BYTES:
                    yield todo
                    todo, done = [], 0
        cipher.finalize()
        todo.append(memoryview(cipher.tag))
        yield todo

    def _place(self, start: int, count: int) -> memoryview:
        if self._scratch is None:
            self._scratch = memoryview(bytearray(CHUNK_BYTES))
        return self._scratch[start : start + count]


class Opener:
    """What one side hears on a connection. For one thread at a time."""

    def __init__(self, level: Level, ticket_key: bytes, nonces: bytes, other: Side) -> None:
        """``nonces`` are the client's and the receiver's, joined."""
        self._level = level
        self._numbered = _numbered(level, ticket_key, nonces, other)
        #: Bytes beside a header or a payload.
        self.tag_bytes = TAG_BYTES if self._numbered is not None else 0
        #: Bytes that a header comes in.
        self.head_bytes = HEADER_BYTES + self.tag_bytes

    def small(self, data: bytes) -> bytes:
        """A header, or a small payload, that came in these bytes. Raises TransportError."""
        if self._numbered is None:
            return data
        try:
            return self._numbered.open(self._level, data)
        except InvalidTag:
            raise _tampered() from None

    def payload(self, buffers: Sequence[memoryview], tag: memoryview) -> None:
        """Check a payload that came into the buffers, and decrypt it in them.

        Raises TransportError; the buffers then hold nothing of use.
        """
        if self._numbered is None:
            return
        cipher = self._numbered.stream().decryptor()
        try:
            for buffer in buffers:
                if self._level == "sealed":
                    cipher.update_into(buffer, buffer)
                else:
                    cipher.authenticate_additional_data(buffer)
            cipher.finalize_with_tag(bytes(tag))
        except InvalidTag:
            raise _tampered() from None

    def skip(self) -> None:
        """A payload came that nobody wants to know."""
        if self._numbered is not None:
            self._numbered.nonce()


def _tampered() -> TransportError:
    return TransportError("a frame was changed, lost, repeated or made up on the way")
