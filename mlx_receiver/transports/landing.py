"""One block from a transport into the memory that the receiver names for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

import numpy as np
import xxhash

from mlx_receiver.transports.transport import BlockSink, Landing
from mlx_receiver.wire.frames import Header
from mlx_receiver.wire.messages import E_BLOCK, WireError

_SCRATCH_BYTES: Final = 1 << 20

#: Writes a block's whole payload into the buffers, in order; the flag says whether anybody will
#: look at it. Raises TransportError when it cannot, or when the payload is not what was sent.
Fill = Callable[[Header, Sequence[memoryview], bool], None]


class Lander:
    """Lands the blocks of one connection. Used from that connection's thread."""

    def __init__(self, sink: BlockSink) -> None:
        self._sink = sink
        self._scratch: memoryview | None = None

    def land(self, client: str, header: Header, fill: Fill) -> bool:
        """Have ``fill`` write the block where it belongs and commit it; whether it was accepted.

        A block that the sink refuses is read and thrown away, so that the next one can follow.
        What ``fill`` raises passes through, after the landing was aborted.
        """
        accepted = True
        try:
            landing = self._sink.landing(client, header)
        except WireError as error:
            self._sink.rejected(client, header, error.code, error.reason)
            landing, accepted = Landing(self._discard(header.payload_bytes)), False
        try:
            fill(header, landing.buffers, accepted)
        except BaseException:
            landing.abort()
            raise
        if not accepted:
            return False
        try:
            if header.checksum and header.checksum != checksum(landing.buffers):
                landing.abort()
                raise WireError(E_BLOCK, f"{header.describe()}: the checksum does not match")
            landing.commit()
        except WireError as error:
            self._sink.rejected(client, header, error.code, error.reason)
            return False
        return True

    def discard(self, header: Header, fill: Fill) -> None:
        """Have ``fill`` read a payload that nobody wants."""
        fill(header, self._discard(header.payload_bytes), False)

    def _discard(self, count: int) -> list[memoryview]:
        if self._scratch is None:
            self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        whole, rest = divmod(count, _SCRATCH_BYTES)
        return [self._scratch] * whole + [self._scratch[:rest]]


def checksum(buffers: Sequence[memoryview]) -> int:
    """The low 32 bits of the XXH3-64 of the buffers' bytes, never 0: that means "none".

    It hashes five times what zlib's CRC-32 does in the same time.
    """
    digest = xxhash.xxh3_64()
    for buffer in buffers:
        digest.update(buffer)
    return digest.intdigest() & 0xFFFFFFFF or 1


def scatter(sources: Iterable[memoryview], targets: Sequence[memoryview]) -> None:
    """Copy the sources' bytes into the targets, one after the other; both hold as many. A source is
    asked for once the one before it has been copied."""
    # NumPy lets other threads run while it copies; a memoryview's slice assignment does not.
    chunks: Iterator[memoryview] = iter(sources)
    chunk = next(chunks, memoryview(b""))
    for target in targets:
        done = 0
        while done < target.nbytes:
            if not chunk.nbytes:
                chunk = next(chunks)
                continue
            count = min(target.nbytes - done, chunk.nbytes)
            np.copyto(
                np.frombuffer(target[done : done + count], np.uint8),
                np.frombuffer(chunk[:count], np.uint8),
            )
            done += count
            chunk = chunk[count:]
