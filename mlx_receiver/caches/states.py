"""States of a whole text: mlx-lm's ``ArraysCache``, of recurrent layers (Mamba, gated delta net,
short convolution).

The first array, where it is ``[1, kept inputs, channels]``, is that of a convolution: it travels
with a row of one number for each channel, since vLLM's workers divide the channels among them. Of
the others they divide the heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import ArraysCache
from numpy.typing import NDArray

from mlx_receiver.caches.adapter import CARRIERS, Before, Rows, numbers, wire_dtype
from mlx_receiver.wire.layout import DTYPES, ITEMSIZE, RECURRENT, LayerLayout, Part


class States:
    """See ``ResumingAdapter``."""

    kind = RECURRENT

    def layout(self, cache: Any) -> LayerLayout | None:
        if type(cache) is not ArraysCache or any(array is None for array in cache.cache):
            return None
        if any(array.ndim < 3 or wire_dtype(array) not in DTYPES for array in cache.cache):
            return None
        return LayerLayout(RECURRENT, [_part(i, array) for i, array in enumerate(cache.cache)])

    def nbytes(self, layer: LayerLayout, tokens: int, headroom: int, itemsize: int) -> int:
        return sum(part.row * part.rows for part in layer.parts) * itemsize

    def allocate(self, layer: LayerLayout, tokens: int, headroom: int) -> StatesBuffers:
        return StatesBuffers(layer)

    def resume(
        self, layer: LayerLayout, before: Before, tokens: int, headroom: int
    ) -> StatesBuffers:
        """See ``ResumingAdapter.resume``: states of the whole text always travel."""
        return StatesBuffers(layer)

    def room(self, cache: Any) -> None:
        """See ``ResumingAdapter.room``."""

    def kept(self, layer: LayerLayout, cache: Any) -> None:
        """See ``ResumingAdapter.kept``."""

    def empty(self, layer: LayerLayout) -> Any:
        return ArraysCache(len(layer.parts))

    def parts(self, layer: LayerLayout, cache: Any, tokens: int) -> list[mx.array]:
        return [
            array[0].reshape(part.heads, part.rows, part.width)
            for part, array in zip(layer.parts, cache.cache, strict=True)
        ]


def _part(index: int, array: mx.array) -> Part:
    convolution = index == 0 and array.ndim == 3
    return Part(
        f"state{index}",
        array.shape[1],
        1 if convolution else prod(array.shape[2:]),
        wire_dtype(array),  # type: ignore[arg-type]
        by_token=False,
        dims=list(array.shape[2:]) if array.ndim > 3 else [],
        rows=array.shape[2] if convolution else 1,
    )


class StatesBuffers:
    """The arrays of one layer, as ``LayerBuffers``."""

    def __init__(self, layer: LayerLayout) -> None:
        self._parts = layer.parts
        self._shapes = [
            (1, part.heads, *(part.dims or [part.rows * part.width])) for part in layer.parts
        ]
        self._arrays = [
            mx.zeros((part.heads, part.rows, part.width), CARRIERS[ITEMSIZE[part.dtype]])
            for part in layer.parts
        ]
        mx.eval(self._arrays)
        self._aliases: list[NDArray[Any]] = [np.array(array, copy=False) for array in self._arrays]

    def part(self, index: int) -> NDArray[Any]:
        return self._aliases[index]

    def rows(self, index: int, heads: slice, tokens: slice) -> Rows:
        return Rows([row.data.cast("B") for row in self._aliases[index][heads, tokens]])

    def build(self, dtypes: Sequence[mx.Dtype]) -> tuple[Any, list[mx.array]]:
        self._aliases = []
        cache = ArraysCache(len(self._arrays))
        cache.cache = [
            numbers(array, part, dtype).reshape(shape)
            for array, part, shape, dtype in zip(
                self._arrays, self._parts, self._shapes, dtypes, strict=True
            )
        ]
        self._arrays = []
        return cache, list(cache.cache)
