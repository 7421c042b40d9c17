"""How fast blocks that come quantised are decoded: what a connection's thread does with one."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from typing import Final

import numpy as np

from mlx_receiver.caches.quantised import decoded, scratch_bytes
from mlx_receiver.transports.landing import scatter
from mlx_receiver.wire.frames import Header, Kind
from mlx_receiver.wire.layout import ITEMSIZE, CacheLayout, Part
from mlx_receiver.wire.profile import Coding
from mlx_receiver.wire.quantised import BITS, RAW, codec_of, row_bytes

#: Bytes of a raw block: K or V of a piece of a layer that vLLM's side sends at once.
_BLOCK: Final = 4 << 20
#: Rounds for each codec, of which the fastest counts, and seconds of each.
_ROUNDS: Final = 3
_SECONDS: Final = 0.012
#: Connections beyond which it is not looked whether one more helps.
_MOST_THREADS: Final = 4


class Decoding:
    """For any one thread that nobody waits for."""

    def __init__(self, layout: CacheLayout) -> None:
        """Blocks are those of a cache of that layout."""
        self._part = next(
            (p for layer in layout.layers for p in layer.parts if codec_of(p, "q8") != RAW), None
        )
        self._threads = min(_MOST_THREADS, os.cpu_count() or 1)
        self._rates: dict[str, float] = {}
        #: What is known so far, and whether that is all that there is.
        self.found = Coding()
        self.done = self._part is None

    @property
    def nbytes(self) -> int:
        """Memory that a step takes."""
        if self._part is None:
            return 0
        header = _header(self._part, "q8")
        return self._threads * (_raw_bytes(header) + header.payload_bytes + scratch_bytes(header))

    def step(self) -> None:
        """Measure one thing more, for some hundredths of a second."""
        if self._part is None:
            return
        codec = next((codec for codec in BITS if codec not in self._rates), "")
        if codec:
            block = self._blocks(codec, 1)
            self._rates[codec] = max(_rate(block) for _ in range(_ROUNDS))
            self.found = Coding(**self._rates)
            return
        blocks, most = self._blocks("q8", self._threads), float(self._threads)
        helping = max(_rate(blocks) for _ in range(_ROUNDS)) / max(self._rates["q8"], 1.0)
        self.found = Coding(**self._rates, threads=min(max(1.0, helping), most))
        self.done = True

    def _blocks(self, codec: str, count: int) -> list[_Block]:
        assert self._part is not None
        blocks = [_Block(_header(self._part, codec)) for _ in range(count)]
        for block in blocks:
            block.decode()  # the first time its memory is made
        return blocks


class _Block:
    def __init__(self, header: Header) -> None:
        self._header = header
        self.raw_bytes = _raw_bytes(header)
        self._out = [np.empty(self.raw_bytes, np.uint8).data]
        self._payload = _payload(header)

    def decode(self) -> None:
        scatter(decoded(self._header, self._payload), self._out)


def _header(part: Part, codec: str) -> Header:
    tokens = max(1, _BLOCK // (part.heads * row_bytes(RAW, part.dtype, part.width)))
    return Header(
        Kind.BLOCK,
        session=1,
        payload_bytes=part.heads * tokens * row_bytes(codec, part.dtype, part.width),
        dtype=part.dtype,
        heads=part.heads,
        tokens=tokens,
        width=part.width,
        codec=codec,
    )


def _raw_bytes(header: Header) -> int:
    return header.heads * header.tokens * row_bytes(RAW, header.dtype, header.width)


def _payload(header: Header) -> memoryview:
    """Any numbers, with scales and biases of 2 ** -6: what is small or infinite takes longer."""
    payload = np.resize(np.arange(251, dtype=np.uint8), header.payload_bytes)
    size = ITEMSIZE[header.dtype]
    groups = header.heads * header.tokens * row_bytes(RAW, header.dtype, header.width) // size // 64
    ones = {"float32": 0x3C800000, "float16": 0x2400, "bfloat16": 0x3C80}[header.dtype]
    scales = payload[len(payload) - 2 * groups * size :]
    scales.view(np.uint32 if size == 4 else np.uint16)[:] = ones
    return payload.data


def _rate(blocks: Sequence[_Block]) -> float:
    """Bytes of raw KV a second, with a thread for each of them."""
    done = [0] * len(blocks)
    until = time.perf_counter() + _SECONDS

    def decode(index: int) -> None:
        while not done[index] or time.perf_counter() < until:
            blocks[index].decode()
            done[index] += 1

    began = time.perf_counter()
    others = [threading.Thread(target=decode, args=(n,)) for n in range(1, len(blocks))]
    for thread in others:
        thread.start()
    decode(0)
    for thread in others:
        thread.join()
    return sum(done) * blocks[0].raw_bytes / (time.perf_counter() - began)
