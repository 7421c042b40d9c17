"""K and V of every token: mlx-lm's ``KVCache``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache
from numpy.typing import NDArray

from mlx_receiver.caches.adapter import CARRIERS, Before, Rows, numbers, wire_dtype
from mlx_receiver.caches.cuda_staging import Staging, staging
from mlx_receiver.caches.joinable import JoinableKVCache
from mlx_receiver.wire.layout import FULL, ITEMSIZE, KEYS, VALUES, LayerLayout, Part

#: ``KVCache`` grows in steps of this many tokens, copying itself each time.
STEP: Final = KVCache.step


class PlainKV:
    """See ``BranchingAdapter``."""

    kind = FULL

    def layout(self, cache: Any) -> LayerLayout | None:
        return keys_and_values(cache) if type(cache) in (KVCache, JoinableKVCache) else None

    def nbytes(self, layer: LayerLayout, tokens: int, headroom: int, itemsize: int) -> int:
        return capacity(tokens, headroom) * sum(part.row for part in layer.parts) * itemsize

    def allocate(self, layer: LayerLayout, tokens: int, headroom: int) -> PlainKVBuffers:
        return PlainKVBuffers(
            layer,
            capacity(tokens, headroom),
            staging(),
            lambda keys, values: JoinableKVCache.holding(keys, values, tokens),
        )

    def resume(
        self, layer: LayerLayout, before: Before, tokens: int, headroom: int
    ) -> PlainKVBuffers:
        arrays = [before.cache.keys, before.cache.values]
        if not before.alone:
            rows = layer.parts[0].start(tokens, before.held)
            arrays = [array[:, :, :rows] for array in arrays]
        return PlainKVBuffers(
            layer,
            capacity(tokens, headroom),
            staging(),
            lambda keys, values: JoinableKVCache.holding(keys, values, tokens),
            arrays,
            before.alone,
        )

    def room(self, cache: Any) -> int:
        room: int = cache.keys.shape[2]
        return room

    def kept(self, layer: LayerLayout, cache: Any) -> Any:
        return cache

    def beginning(self, layer: LayerLayout, cache: Any, tokens: int) -> Any:
        # With a row more at least: a whole array would be shared, and copied at the next step.
        rows = capacity(tokens, 1)
        copies: list[mx.array] = []
        for array in (cache.keys, cache.values):
            _, heads, _, width = array.shape
            rest = mx.zeros((1, heads, rows - tokens, width), array.dtype)
            copies.append(mx.concatenate([array[:, :, :tokens], rest], axis=2))
        mx.eval(copies)
        keys, values = copies
        return JoinableKVCache.holding(keys, values, tokens)

    def empty(self, layer: LayerLayout) -> Any:
        return JoinableKVCache()

    def parts(self, layer: LayerLayout, cache: Any, tokens: int) -> list[mx.array]:
        return [array[0, :, :tokens] for array in (cache.keys, cache.values)]


def keys_and_values(cache: Any) -> LayerLayout:
    """What a cache with ``keys`` and ``values`` ``[1, heads, tokens, width]`` holds, if it holds
    them of every token."""
    parts = []
    for name, array in ((KEYS, cache.keys), (VALUES, cache.values)):
        _, heads, _, width = array.shape
        parts.append(Part(name, heads, width, wire_dtype(array)))  # type: ignore[arg-type]
    return LayerLayout(FULL, parts)


def capacity(tokens: int, headroom: int) -> int:
    """Tokens that there is room for: mlx-lm's cache grows in whole steps."""
    return -(-(tokens + headroom) // STEP) * STEP


class PlainKVBuffers:
    """K and V of one layer, ``[1, heads, capacity, head_dim]`` each, as ``LayerBuffers``."""

    def __init__(
        self,
        layer: LayerLayout,
        capacity: int,
        staging: Staging | None,
        hold: Callable[[mx.array, mx.array], Any],
        before: Sequence[mx.array] | None = None,
        alone: bool = False,
    ) -> None:
        """``hold`` makes the cache of finished keys and values. They begin with what ``before``
        holds; ``alone``: in its own memory."""
        self._hold = hold
        self._parts = layer.parts
        self._staging = staging
        self._arrays = []
        for index, part in enumerate(layer.parts):
            carrier = CARRIERS[ITEMSIZE[part.dtype]]
            first = before[index].view(carrier) if before is not None else None
            if first is None or not alone:
                rest = capacity - (0 if first is None else first.shape[2])
                zeros = mx.zeros((1, part.heads, rest, part.width), carrier)
                first = zeros if first is None else mx.concatenate([first, zeros], axis=2)
            self._arrays.append(first)
        mx.eval(self._arrays)
        self._aliases: list[NDArray[Any]] = [
            np.array(array, copy=False)[0] for array in self._arrays
        ]

    def part(self, index: int) -> NDArray[Any]:
        if self._staging is not None:
            self._staging.finish()
        return self._aliases[index]

    def rows(self, index: int, heads: slice, tokens: slice) -> Rows:
        place = self._aliases[index][heads, tokens]
        slot = self._staging.acquire(place) if self._staging is not None else None
        if slot is not None:
            return Rows([slot.buffer], slot.written, slot.dropped)
        return Rows([row.data.cast("B") for row in place])

    def build(self, dtypes: Sequence[mx.Dtype]) -> tuple[Any, list[mx.array]]:
        if self._staging is not None:
            self._staging.finish()
        # An alias that outlives this makes MLX copy the buffer at the first decode step.
        self._aliases = []
        keys, values = map(numbers, self._arrays, self._parts, dtypes)
        self._arrays = []
        if [wire_dtype(keys), wire_dtype(values)] != [part.dtype for part in self._parts]:
            # At once: there need not be room for a converted cache beside the whole one.
            mx.eval(keys, values)
        return self._hold(keys, values), [keys, values]
