"""K and V of the last tokens: mlx-lm's ``RotatingKVCache``, of layers whose attention has a
window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import RotatingKVCache

from mlx_receiver.caches.adapter import Before
from mlx_receiver.caches.cuda_staging import staging
from mlx_receiver.caches.plain import PlainKVBuffers, capacity, keys_and_values
from mlx_receiver.wire.layout import WINDOW, LayerLayout, windowed


class LastTokensKV:
    """What such a cache and one of a chunk's tokens have in common as ``ResumingAdapter``."""

    def room(self, cache: Any) -> None:
        """See ``ResumingAdapter.room``: what is shared is copied, at most a window."""

    def kept(self, layer: LayerLayout, cache: Any) -> Any:
        return cache


class WindowKV(LastTokensKV):
    """See ``ResumingAdapter``."""

    kind = WINDOW

    def layout(self, cache: Any) -> LayerLayout | None:
        """See ``CacheAdapter.layout``. One that keeps the first tokens for ever is of another
        kind."""
        if type(cache) is not RotatingKVCache or cache.keep:
            return None
        return windowed(keys_and_values(cache), cache.max_size)

    def nbytes(self, layer: LayerLayout, tokens: int, headroom: int, itemsize: int) -> int:
        return _rows(layer, tokens, headroom) * sum(part.row for part in layer.parts) * itemsize

    def allocate(self, layer: LayerLayout, tokens: int, headroom: int) -> PlainKVBuffers:
        return self._buffers(layer, None, tokens, headroom)

    def resume(
        self, layer: LayerLayout, before: Before, tokens: int, headroom: int
    ) -> PlainKVBuffers:
        ordered = [
            before.cache._temporal_order(array)
            for array in (before.cache.keys, before.cache.values)
        ]
        oldest = before.tokens - ordered[0].shape[2]
        shared = shared_rows(layer, before, tokens, oldest, ordered)
        return self._buffers(layer, shared, tokens, headroom)

    def _buffers(
        self, layer: LayerLayout, before: list[mx.array] | None, tokens: int, headroom: int
    ) -> PlainKVBuffers:
        window, held = _window(layer), layer.parts[0].tokens(tokens)

        def hold(keys: mx.array, values: mx.array) -> RotatingKVCache:
            # In temporal order, and the next token's place after the last one's.
            return RotatingKVCache.from_state((keys, values, tokens, 0, window, held))

        return PlainKVBuffers(layer, _rows(layer, tokens, headroom), staging(), hold, before)

    def empty(self, layer: LayerLayout) -> Any:
        return RotatingKVCache(_window(layer))

    def parts(self, layer: LayerLayout, cache: Any, tokens: int) -> list[mx.array]:
        rows = layer.parts[0].tokens(tokens)
        # In temporal order; a prefill leaves more than the window in it.
        ordered = (cache._temporal_order(array) for array in (cache.keys, cache.values))
        return [array[0, :, :tokens][:, -rows:] for array in ordered]


def shared_rows(
    layer: LayerLayout, before: Before, tokens: int, oldest: int, arrays: Sequence[mx.array]
) -> list[mx.array] | None:
    """What a text of ``tokens`` needs of an earlier one's ``arrays``, ``[1, heads, rows, width]``
    from token ``oldest`` on; None where that is nothing."""
    part = layer.parts[0]
    first, start = part.first(tokens), part.start(tokens, before.held)
    if start == first:
        return None
    return [array[:, :, first - oldest : start - oldest] for array in arrays]


def _window(layer: LayerLayout) -> int:
    window = layer.parts[0].window
    assert window is not None
    return window


def _rows(layer: LayerLayout, tokens: int, headroom: int) -> int:
    """Tokens that there is room for: mlx-lm's cache grows in steps up to its window."""
    return min(capacity(tokens, headroom), _window(layer))
