"""What a kind of cache must be able to do, on its way from blocks to what mlx-lm decodes with.

An adapter owns one kind of layer. It allocates a layer's memory as mlx-lm lays it out, lends NumPy
aliases of it to the data channel's threads, which write each block where it belongs, and hands the
finished cache over without copying it. Everything else knows a layer's parts by their index.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import mlx.core as mx
from numpy.typing import NDArray

from mlx_receiver.wire.layout import LayerLayout

__all__ = ["CARRIERS", "CacheAdapter", "LayerBuffers", "Rows", "mlx_dtype", "wire_dtype"]

#: NumPy has no bfloat16, so aliases carry plain integers of the same width.
CARRIERS: Final = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}

_DTYPES: Final = {
    "bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32, "int8": mx.int8,
}  # fmt: skip


def mlx_dtype(name: str) -> mx.Dtype:
    """The MLX dtype of a wire dtype's name."""
    return _DTYPES[name]


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


class CacheAdapter(Protocol):
    """One kind of layer, registered through the hook ``mac_decode_cache_adapters``."""

    #: ``LayerLayout.kind``.
    kind: str

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
