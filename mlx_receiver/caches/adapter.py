"""What a kind of cache must be able to do, on its way from blocks to what mlx-lm decodes with.

An adapter owns one kind of layer. It allocates a layer's memory as mlx-lm lays it out, lends NumPy
aliases of it to the data channel's threads, which write each block where it belongs, and hands the
finished cache over without copying it. Everything else knows a layer's parts by their index.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Protocol, cast

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_receiver.wire.layout import Held, LayerLayout, Part

__all__ = ["CARRIERS", "CacheAdapter", "LayerBuffers", "Rows", "mlx_dtype", "numbers", "wire_dtype"]

#: NumPy has no bfloat16, so aliases carry plain integers of the same width.
CARRIERS: Final = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}

_DTYPES: Final = {
    "bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32, "int8": mx.int8,
}  # fmt: skip


def mlx_dtype(name: str) -> mx.Dtype:
    """The MLX dtype of a wire dtype's name."""
    return _DTYPES[name]


def numbers(array: mx.array, part: Part, dtype: mx.Dtype) -> mx.array:
    """What has arrived of ``part``, an array of ``CARRIERS``, in the ``dtype`` that it is decoded
    in. Without a copy where that is the dtype in which it travels."""
    if part.dtype in _DTYPES:
        found = array.view(_DTYPES[part.dtype])
        if part.scale != 1.0:
            found = found.astype(mx.float32) * part.scale
        return found.astype(dtype)
    # 8-bit floats are few enough to look each up: exactly what vLLM's attention reads.
    return mx.array(_float8(part.dtype) * np.float32(part.scale)).astype(dtype)[array]


@cache
def _float8(dtype: str) -> NDArray[np.float32]:
    """What the 256 numbers stand for: OCP's 8-bit floats, with 4 or 5 bits of exponent."""
    exponent_bits = {"float8_e4m3": 4, "float8_e5m2": 5}[dtype]
    fraction_bits = 7 - exponent_bits
    codes = np.arange(256)
    exponent = codes >> fraction_bits & (1 << exponent_bits) - 1
    fraction = (codes & (1 << fraction_bits) - 1) / (1 << fraction_bits)
    bias = (1 << exponent_bits - 1) - 1
    found = np.where(exponent > 0, 1 + fraction, 2 * fraction) * 2.0 ** (exponent - bias)
    if exponent_bits == 5:
        found[exponent == 31] = np.where(fraction[exponent == 31] > 0, np.nan, np.inf)
    else:
        found[codes & 127 == 127] = np.nan  # the only ones; there is no infinity
    return np.where(codes < 128, found, -found).astype(np.float32)


def wire_dtype(array: mx.array) -> str:
    """The wire's name of an array's dtype."""
    return str(array.dtype).rpartition(".")[2]


@dataclass(slots=True)
class Rows:
    """Memory for one block's payload, to be written in order.

    ``written`` or ``dropped`` is called exactly once. Whoever still held a buffer afterwards would
    make MLX copy the cache before decoding.
    """

    buffers: list[memoryview]
    written: Callable[[], None] = lambda: None
    dropped: Callable[[], None] = lambda: None


class LayerBuffers(Protocol):
    """One layer's memory, first written by the data channel's threads, then decoded from."""

    def part(self, index: int) -> NDArray[Any]:
        """A writable alias ``[heads, rows, width]`` of integers as wide as the part's dtype."""

    def rows(self, index: int, heads: slice, tokens: slice) -> Rows:
        """Memory for a block of that part, ``[heads, tokens, width]``."""

    def build(self, dtypes: Sequence[mx.Dtype]) -> tuple[Any, list[mx.array]]:
        """The layer's cache, each part in its dtype, offset at the last token received, and its
        arrays that are still to be evaluated: of all layers together, since each time waits for the
        device.

        Call once, on the decoding thread, when nothing writes any more; the aliases are gone
        afterwards and the cache is the memory's only owner.
        """


@dataclass(frozen=True, slots=True)
class Before:
    """An earlier text's cache of one layer, from which another text takes what they share.

    It is of ``tokens`` tokens, and what is ``held`` of the other text is in it. Who has it
    ``alone`` writes behind its last token, into its own memory.
    """

    cache: Any
    tokens: int
    held: Held
    alone: bool


class CacheAdapter(Protocol):
    """One kind of layer, registered through the hook ``mac_decode_cache_adapters``."""

    #: ``LayerLayout.kind``.
    kind: str

    # One may say ``batched = False``: mlx-lm cannot decode several such caches in one step.

    def layout(self, cache: Any) -> LayerLayout | None:
        """The layout of a cache that mlx-lm made and that holds a token; None for another
        kind's."""

    def nbytes(self, layer: LayerLayout, tokens: int, headroom: int, itemsize: int) -> int:
        """Bytes that ``allocate`` takes, with numbers of ``itemsize`` bytes."""

    def allocate(self, layer: LayerLayout, tokens: int, headroom: int) -> LayerBuffers:
        """Memory for ``tokens`` received tokens and at least ``headroom`` decoded ones, in the
        dtypes of the layout. Any thread may call it: the memory is evaluated."""

    def empty(self, layer: LayerLayout) -> Any:
        """A cache without tokens, for a prompt that MLX prefills itself."""

    def parts(self, layer: LayerLayout, cache: Any, tokens: int) -> list[mx.array]:
        """What the cache holds of so many tokens, as it travels: ``[heads, rows, width]`` for each
        part, in the layout's order."""


class ResumingAdapter(CacheAdapter, Protocol):
    """An adapter of caches whose texts can continue earlier ones: of a prompt that begins like an
    earlier text only the rest has to travel."""

    def kept(self, layer: LayerLayout, cache: Any) -> Any:
        """What of a text's cache is worth keeping after its end; has ``nbytes``, or is None."""

    def room(self, cache: Any) -> int | None:
        """Tokens that what is kept has room for in its own memory; None where that does not
        matter."""

    def resume(
        self, layer: LayerLayout, before: Before, tokens: int, headroom: int
    ) -> LayerBuffers:
        """As ``allocate``, with the rows in place that are held (``wire.layout.Held``)."""


class BranchingAdapter(ResumingAdapter, Protocol):
    """An adapter of caches whose first rows stay what they are while a text is decoded: another
    prompt can begin with them before that text has ended."""

    def beginning(self, layer: LayerLayout, cache: Any, tokens: int) -> Any:
        """What ``kept`` would be of the text's first ``tokens`` alone, in memory of its own. On the
        decoding thread; ``cache`` is one text's, and holds more than those."""


def resuming(adapter: CacheAdapter) -> ResumingAdapter | None:
    """The adapter, if its texts can continue earlier ones. A subclass that allocates in its own way
    must resume in its own way, too."""
    for kind in type(adapter).__mro__:
        if "resume" in vars(kind):
            return cast(ResumingAdapter, adapter)
        if "allocate" in vars(kind):
            return None
    return None


def branching(adapter: CacheAdapter) -> BranchingAdapter | None:
    """The adapter, if other texts can begin like one that is decoded; of a subclass see
    ``resuming``."""
    for kind in type(adapter).__mro__:
        if "beginning" in vars(kind):
            return cast(BranchingAdapter, adapter)
        if "resume" in vars(kind) or "allocate" in vars(kind):
            return None
    return None
