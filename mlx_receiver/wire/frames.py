"""Frames of the data channel: one fixed header, then the payload.

A BLOCK is a rectangle of one part of one layer (``layout``): ``heads`` x ``tokens`` x ``width``,
head-major and contiguous (``[heads, tokens, width]``), so that each head's rows land in the
receiver's ``[1, heads, tokens, width]`` cache with one contiguous read a head. Of a part that is
not indexed by token, the header's tokens are its rows. Blocks may arrive in any order, from any
number of connections (one for each vLLM worker). What a quantised one looks like, ``quantised``
says.

The first six bytes, MAGIC and the version, are the same in every version. How frames look on a
protected ``tcp`` connection, ``transports/seal.py`` says.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from mlx_receiver.wire.layout import DTYPES, ITEMSIZE, MAX_PARTS, NOTHING, CacheLayout, Held
from mlx_receiver.wire.messages import E_BLOCK, E_PROTOCOL, PROTOCOL_VERSION, Code, WireError
from mlx_receiver.wire.quantised import CODECS, RAW, quantisable, row_bytes
from mlx_receiver.wire.ranges import SessionId, Text

MAGIC: Final = b"MDKV"

#: Largest number of a session (``messages.SessionId``).
MAX_SESSION: Final = 2**63 - 1

#: Largest payload of one frame, in bytes. Senders split; a larger one is refused unread.
MAX_PAYLOAD: Final = 64 << 20

#: Largest payload of a frame that is not a BLOCK, in bytes.
MAX_SMALL_PAYLOAD: Final = 64 << 10


class Kind(enum.IntEnum):
    """What a frame carries."""

    HELLO = 1  # client: DataHello, who it is
    ATTACH = 2  # client: tell me when the session may receive blocks
    BLOCK = 3  # client: a rectangle of KV
    REPLY = 4  # receiver: DataReply
    CREDIT = 5  # receiver: one more unit may be sent (transports without flow control)
    CHALLENGE = 6  # receiver: DataChallenge, its own proof and what the client must prove
    PROOF = 7  # client: DataProof; before it nothing is read that is larger
    PROBE = 8  # client: bytes that are thrown away, and acknowledged by a REPLY of session 0


#: One byte holds the dtype's code above the part's index.
_PART_BITS: Final = MAX_PARTS.bit_length() - 1

#: One byte holds the codec's code above the kind.
_KIND_BITS: Final = 4

_HEADER: Final = struct.Struct("<4sHBBQHHHHIIIIqqq")
HEADER_BYTES: Final = _HEADER.size


@dataclass(frozen=True, slots=True)
class Header:
    """The header of any frame. Fields after ``payload_bytes`` are zero unless it is a BLOCK.

    ``part`` is the part's index in its layer's layout; ``dtype`` is that of its numbers, and
    ``codec`` (``quantised``) says how they travel. Times are the sender's monotonic clock in
    nanoseconds: ``computed_ns`` when the layer's part of the cache existed, ``gathered_ns`` when
    it left the paged cache, ``sent_ns`` when the frame was handed to the network. ``checksum`` is
    the payload's (``landing.checksum``), or 0 where none was made.
    """

    kind: Kind
    session: int
    payload_bytes: int
    layer: int = 0
    part: int = 0
    dtype: str = DTYPES[0]
    head_start: int = 0
    heads: int = 0
    width: int = 0
    token_start: int = 0
    tokens: int = 0
    checksum: int = 0
    computed_ns: int = 0
    gathered_ns: int = 0
    sent_ns: int = 0
    codec: str = RAW

    def pack(self) -> bytes:
        """The header as ``HEADER_BYTES`` bytes, little-endian."""
        return _HEADER.pack(
            MAGIC,
            PROTOCOL_VERSION,
            (CODECS.index(self.codec) << _KIND_BITS) | self.kind,
            (DTYPES.index(self.dtype) << _PART_BITS) | self.part,
            self.session,
            self.layer,
            self.head_start,
            self.heads,
            self.width,
            self.token_start,
            self.tokens,
            self.payload_bytes,
            self.checksum,
            self.computed_ns,
            self.gathered_ns,
            self.sent_ns,
        )

    def describe(self, part: str = "") -> str:
        """Which piece of which session, for messages; ``part`` is its name, where that is known."""
        return (
            f"session {self.session}, layer {self.layer}, {part or f'part {self.part}'}, "
            f"heads {self.head_start}..{self.head_start + self.heads - 1}, "
            f"tokens {self.token_start}..{self.token_start + self.tokens - 1}"
        )


def unpack(data: bytes | bytearray | memoryview) -> Header:
    """Read a header and check everything that can be checked without knowing the session.

    Raises WireError: ``protocol`` for bytes that are no frame of this version (the stream cannot
    be trusted any further), ``block`` for a BLOCK whose size does not follow from its shape.
    """
    (
        magic,
        version,
        kind,
        bits,
        session,
        layer,
        head_start,
        heads,
        width,
        token_start,
        tokens,
        payload,
        checksum,
        computed,
        gathered,
        sent,
    ) = _HEADER.unpack(data)
    if magic != MAGIC:
        raise WireError(E_PROTOCOL, f"a data frame starts with {magic!r}, not {MAGIC!r}")
    if version != PROTOCOL_VERSION:
        raise WireError(
            E_PROTOCOL, f"a data frame of protocol {version}, this side speaks {PROTOCOL_VERSION}"
        )
    if session > MAX_SESSION:
        raise WireError(E_PROTOCOL, f"a data frame of session {session}, which no client can open")
    if payload > MAX_PAYLOAD:
        raise WireError(E_PROTOCOL, f"a data frame of {payload} bytes is over {MAX_PAYLOAD}")
    try:
        frame_kind, codec = Kind(kind & (1 << _KIND_BITS) - 1), CODECS[kind >> _KIND_BITS]
    except (ValueError, IndexError):
        raise WireError(E_PROTOCOL, f"a data frame of unknown kind {kind}") from None
    if bits >> _PART_BITS >= len(DTYPES):
        raise WireError(E_PROTOCOL, f"a data frame of unknown dtype code {bits >> _PART_BITS}")
    header = Header(
        kind=frame_kind,
        session=session,
        payload_bytes=payload,
        layer=layer,
        part=bits & (MAX_PARTS - 1),
        dtype=DTYPES[bits >> _PART_BITS],
        head_start=head_start,
        heads=heads,
        width=width,
        token_start=token_start,
        tokens=tokens,
        checksum=checksum,
        computed_ns=computed,
        gathered_ns=gathered,
        sent_ns=sent,
        codec=codec,
    )
    if frame_kind is Kind.BLOCK:
        _check_size(header)
    elif codec != RAW:
        raise WireError(E_PROTOCOL, f"a {frame_kind.name} whose payload is {codec}")
    return header


def _check_size(header: Header) -> None:
    """Whether a block's payload has the size that follows from its shape, here and once it is
    decoded. Raises WireError (``block``)."""
    rows, width, dtype = header.heads * header.tokens, header.width, header.dtype
    if header.codec != RAW:
        if not quantisable(dtype, width):
            raise WireError(
                E_BLOCK, f"{header.describe()}: rows of {width} x {dtype} cannot be {header.codec}"
            )
        if rows * row_bytes(RAW, dtype, width) > MAX_PAYLOAD:
            raise WireError(
                E_BLOCK,
                f"{header.describe()}: {header.codec}, it stands for more than {MAX_PAYLOAD} bytes",
            )
    expected = rows * row_bytes(header.codec, dtype, width)
    if expected == 0 or header.payload_bytes != expected:
        how = "" if header.codec == RAW else f" in {header.codec}"
        raise WireError(
            E_BLOCK,
            f"{header.describe()}: {header.payload_bytes} payload bytes, but {header.heads} heads "
            f"x {header.tokens} tokens x {width} x {dtype}{how} are {expected}",
        )


def unpack_client(head: bytes | bytearray | memoryview) -> Header:
    """The header of a frame that an authenticated client may send: ATTACH, BLOCK or PROBE.

    Raises WireError (``protocol``): nothing that follows on the connection can be trusted.
    """
    try:
        header = unpack(head)
    except WireError as error:
        # A BLOCK whose header lies about its payload: the next frame cannot be found.
        raise WireError(E_PROTOCOL, error.reason) from None
    if header.kind not in (Kind.ATTACH, Kind.BLOCK, Kind.PROBE):
        raise WireError(E_PROTOCOL, f"a client must not send {header.kind.name}")
    if header.kind is Kind.ATTACH and header.payload_bytes:
        raise WireError(E_PROTOCOL, f"an ATTACH of {header.payload_bytes} payload bytes")
    return header


def blocks(
    session: int, tokens: int, layout: CacheLayout, frame_bytes: int = MAX_PAYLOAD
) -> Iterator[Header]:
    """The headers of a prompt's whole cache: all heads of as many tokens as ``frame_bytes`` hold,
    part by part, layer by layer."""
    for layer, of_layer in enumerate(layout.layers):
        for index, part in enumerate(of_layer.parts):
            row = part.row * ITEMSIZE[part.dtype]
            first = part.first(tokens)
            end = first + part.tokens(tokens)
            step = max(1, frame_bytes // row)
            for start in range(first, end, step):
                count = min(step, end - start)
                yield Header(
                    kind=Kind.BLOCK,
                    session=session,
                    payload_bytes=count * row,
                    layer=layer,
                    part=index,
                    dtype=part.dtype,
                    heads=part.heads,
                    width=part.width,
                    token_start=start,
                    tokens=count,
                )


_Nonce = Annotated[bytes, Meta(min_length=32, max_length=32)]

#: How the frames after the handshake are protected: not at all, authenticated, or encrypted, too.
Level = Literal["clear", "signed", "sealed"]


class DataHello(msgspec.Struct, frozen=True):
    """Payload of HELLO: which client (``DataTicket.client``) opens this data connection, and how
    it is to be protected."""

    client: Annotated[str, Meta(min_length=1, max_length=64)]
    nonce: _Nonce
    level: Level


class DataChallenge(msgspec.Struct, frozen=True):
    """Payload of CHALLENGE: ``keys.proof`` by "receiver" over both nonces and the level."""

    nonce: _Nonce
    proof: _Nonce


class DataProof(msgspec.Struct, frozen=True):
    """Payload of PROOF: ``keys.proof`` by "client" over both nonces and the level."""

    proof: _Nonce


class DataReply(msgspec.Struct, frozen=True):
    """Payload of REPLY: the session may receive blocks, beside what is ``held`` of it, or it may
    not and why."""

    session: SessionId
    accepted: bool
    code: Code | Literal[""] = ""
    reason: Text = ""
    held: Held = NOTHING


hello_decoder: Final = msgspec.msgpack.Decoder(DataHello)
challenge_decoder: Final = msgspec.msgpack.Decoder(DataChallenge)
proof_decoder: Final = msgspec.msgpack.Decoder(DataProof)
reply_decoder: Final = msgspec.msgpack.Decoder(DataReply)


def decode_reply(body: bytes) -> DataReply:
    """The payload of a REPLY. Raises WireError (``protocol``) for anything else."""
    try:
        return reply_decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise WireError(E_PROTOCOL, f"a REPLY that cannot be read: {error}") from None
