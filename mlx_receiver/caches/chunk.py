"""K and V of the tokens of one chunk: mlx-lm's ``ChunkedKVCache``, of layers whose tokens attend to
those of their own chunk only (Llama 4)."""

from __future__ import annotations

from typing import Any, Final

import mlx.core as mx
from mlx_lm.models.cache import ChunkedKVCache

from mlx_receiver.caches.adapter import Before
from mlx_receiver.caches.cuda_staging import staging
from mlx_receiver.caches.plain import STEP, PlainKVBuffers, capacity, keys_and_values
from mlx_receiver.caches.window import LastTokensKV, shared_rows
from mlx_receiver.wire.layout import CHUNK, LayerLayout, chunked

#: Tokens of a prompt that are computed in one step, at most (``decode/batch.py``).
_AT_ONCE: Final = 2048


class ChunkKV(LastTokensKV):
    """See ``ResumingAdapter``. mlx-lm has no batch of such caches."""

    kind = CHUNK
    batched = False

    def layout(self, cache: Any) -> LayerLayout | None:
        if type(cache) is not ChunkedKVCache:
            return None
        return chunked(keys_and_values(cache), cache.chunk_size)

    def nbytes(self, layer: LayerLayout, tokens: int, headroom: int, itemsize: int) -> int:
        """See ``CacheAdapter.nbytes``. mlx-lm keeps a chunk's worth of tokens, and adds what comes
        before it drops what is more."""
        rows = min(capacity(tokens, headroom), capacity(_chunk(layer), _AT_ONCE + STEP))
        return rows * sum(part.row for part in layer.parts) * itemsize

    def allocate(self, layer: LayerLayout, tokens: int, headroom: int) -> PlainKVBuffers:
        return self._buffers(layer, None, tokens, headroom)

    def resume(
        self, layer: LayerLayout, before: Before, tokens: int, headroom: int
    ) -> PlainKVBuffers:
        cache = before.cache
        arrays = (cache.keys, cache.values)
        shared = shared_rows(layer, before, tokens, cache.start_position, arrays)
        return self._buffers(layer, shared, tokens, headroom)

    def _buffers(
        self, layer: LayerLayout, before: list[mx.array] | None, tokens: int, headroom: int
    ) -> PlainKVBuffers:
        chunk, first = _chunk(layer), layer.parts[0].first(tokens)

        def hold(keys: mx.array, values: mx.array) -> ChunkedKVCache:
            return ChunkedKVCache.from_state((keys, values, tokens, chunk, first))

        room = min(capacity(tokens - first, headroom), capacity(chunk, STEP))
        return PlainKVBuffers(layer, room, staging(), hold, before)

    def empty(self, layer: LayerLayout) -> Any:
        return ChunkedKVCache(_chunk(layer))

    def parts(self, layer: LayerLayout, cache: Any, tokens: int) -> list[mx.array]:
        begin, end = (at - cache.start_position for at in (layer.parts[0].first(tokens), tokens))
        return [array[0, :, begin:end] for array in (cache.keys, cache.values)]


def _chunk(layer: LayerLayout) -> int:
    chunk = layer.parts[0].chunk
    assert chunk is not None
    return chunk
