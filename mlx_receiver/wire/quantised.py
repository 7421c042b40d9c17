"""How a block's numbers may travel: as they are, or quantised as MLX quantises them.

A quantised block is what ``mx.quantize`` makes of it, in groups of 64 numbers of a row with a scale
and a bias each: the packed numbers ``[heads, tokens, width * bits / 8]`` in bytes, then the scales
and then the biases, ``[heads, tokens, width / 64]`` each, in the part's own dtype.
"""

from __future__ import annotations

from typing import Final, Protocol

from mlx_receiver.wire.layout import ITEMSIZE, CacheLayout

RAW: Final = "raw"

#: A session's codec. The index is the code in a frame.
CODECS: Final = (RAW, "q8", "q4")

#: Bits of a quantised number.
BITS: Final = {"q8": 8, "q4": 4}

#: Numbers that have a scale and a bias together.
GROUP: Final = 64

#: What can be quantised; narrower numbers are quantised already.
_FLOATS: Final = ("bfloat16", "float16", "float32")


class Rows(Protocol):
    """A part of a layer, as either side describes it."""

    @property
    def dtype(self) -> str:
        """The wire's name of its numbers'."""

    @property
    def width(self) -> int:
        """Numbers of a row."""

    @property
    def by_token(self) -> bool:
        """Whether it has a row for each token: states of the whole text are never quantised."""


def quantisable(dtype: str, width: int) -> bool:
    """Whether rows of such numbers can be."""
    return dtype in _FLOATS and width > 0 and width % GROUP == 0


def codec_of(part: Rows, codec: str) -> str:
    """How a part's blocks travel in a session of that codec."""
    return codec if part.by_token and quantisable(part.dtype, part.width) else RAW


def row_bytes(codec: str, dtype: str, width: int) -> int:
    """Bytes that a row of one head travels in."""
    if codec == RAW:
        return width * ITEMSIZE[dtype]
    return width * BITS[codec] // 8 + 2 * (width // GROUP) * ITEMSIZE[dtype]


def ratio(layout: CacheLayout, codec: str) -> float:
    """Bytes that travel for each raw one, of a prompt's tokens; 1 where nothing is quantised."""
    parts = [part for layer in layout.layers for part in layer.parts if part.by_token]
    raw = sum(part.heads * row_bytes(RAW, part.dtype, part.width) for part in parts)
    sent = sum(
        part.heads * row_bytes(codec_of(part, codec), part.dtype, part.width) for part in parts
    )
    return sent / raw if raw else 1.0
