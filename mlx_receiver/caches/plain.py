"""Cache adapters: from blocks on the wire to the caches that mlx-lm decodes with.

An adapter owns one family of caches. It allocates a session's memory in that family's layout, lends
NumPy aliases of it to the bulk threads, which write each block where it belongs, and hands the
finished caches over without copying them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import BatchKVCache, KVCache
from numpy.typing import NDArray

from mlx_receiver.caches.cuda_staging import Staging, staging
from mlx_receiver.wire.frames import ITEMSIZE
from mlx_receiver.wire.signature import PLAIN_KV_ARCHITECTURES, ModelSignature

#: ``KVCache`` grows in steps of this many tokens, copying itself each time.
STEP = KVCache.step

_DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}
# NumPy has no bfloat16, so the aliases carry plain integers of the same width.
_CARRIERS = {2: mx.uint16, 4: mx.uint32}


def mlx_dtype(name: str) -> mx.Dtype:
    """The MLX dtype of a wire dtype's name."""
    return _DTYPES[name]


@dataclass(slots=True)
class Rows:
    """Memory for one block's payload, to be written in order.

    ``written`` or ``dropped`` is called exactly once. Whoever still held a buffer afterwards would
    make MLX copy the cache before decoding.
    """

    buffers: list[memoryview]
    written: Callable[[], None] = lambda: None
    dropped: Callable[[], None] = lambda: None


class CacheBuffers(Protocol):
    """One session's cache memory, first written by bulk threads, then decoded from.

    It is allocated layer by layer, so that the first block need not wait for the last layer.
    """

    nbytes: int

    @property
    def layers(self) -> int:
        """Layers that are allocated."""

    def grow(self) -> bool:
        """Allocate one more layer; False when all are there."""

    def plane(self, layer: int, plane: int) -> NDArray[Any]:
        """A writable alias ``[heads, capacity, head_dim]`` of integers as wide as the dtype."""

    def rows(self, layer: int, plane: int, heads: slice, tokens: slice) -> Rows:
        """Memory for a block of that plane, ``[heads, tokens, head_dim]``."""

    def build(self, dtype: mx.Dtype) -> list[Any]:
        """The model's caches in ``dtype``, one a layer, offset at the last token received.

        Call once, on the decoding thread, when nothing writes any more; the aliases are gone
        afterwards and the caches are the memory's only owners.
        """


class CacheAdapter(Protocol):
    """A family of caches, registered through the hook ``mac_decode_cache_adapters``."""

    name: str

    def refusal(self, config: Mapping[str, Any], signature: ModelSignature) -> str | None:
        """Why this adapter cannot serve that model; None if it can."""

    def capacity(self, tokens: int, headroom: int) -> int:
        """Tokens that ``allocate`` makes room for."""

    def allocate(
        self, signature: ModelSignature, kv_dtype: str, tokens: int, headroom: int
    ) -> CacheBuffers:
        """Memory for ``tokens`` received tokens and at least ``headroom`` decoded ones. Its first
        layer is allocated, the others are not."""

    def empty(self, signature: ModelSignature) -> list[Any]:
        """Caches without tokens, for a prompt that MLX prefills itself."""


class PlainKV:
    """K and V of every token in every layer: mlx-lm's ``KVCache``."""

    name = "plain"

    def refusal(self, config: Mapping[str, Any], signature: ModelSignature) -> str | None:
        """See ``CacheAdapter.refusal``."""
        if signature.model_type not in PLAIN_KV_ARCHITECTURES:
            known = ", ".join(sorted(PLAIN_KV_ARCHITECTURES))
            return f"model type {signature.model_type!r} is not supported (supported: {known})"
        kinds = set(config.get("layer_types") or ()) - {"full_attention"}
        if kinds or signature.sliding_window is not None:
            return "models with sliding-window layers are not supported"
        return None

    def capacity(self, tokens: int, headroom: int) -> int:
        """See ``CacheAdapter.capacity``."""
        return -(-(tokens + headroom) // STEP) * STEP

    def allocate(
        self, signature: ModelSignature, kv_dtype: str, tokens: int, headroom: int
    ) -> PlainKVBuffers:
        """See ``CacheAdapter.allocate``. Any thread may call it: the memory is evaluated."""
        capacity = self.capacity(tokens, headroom)
        shape = (1, signature.kv_heads, capacity, signature.head_dim)
        return PlainKVBuffers(signature.layers, shape, tokens, kv_dtype, staging())

    def empty(self, signature: ModelSignature) -> list[Any]:
        """See ``CacheAdapter.empty``."""
        return [JoinableKVCache() for _ in range(signature.layers)]


class PlainKVBuffers:
    """K and V buffers ``[1, heads, capacity, head_dim]`` of every layer."""

    def __init__(
        self,
        layers: int,
        shape: tuple[int, int, int, int],
        tokens: int,
        kv_dtype: str,
        staging: Staging | None,
    ) -> None:
        self._layers = layers
        self._shape = shape
        self._tokens = tokens
        self._dtype = mlx_dtype(kv_dtype)
        self._carrier = _CARRIERS[ITEMSIZE[kv_dtype]]
        self._staging = staging
        self._arrays: list[list[mx.array]] = []
        self._aliases: list[list[NDArray[Any]]] = []
        self.nbytes = 2 * layers * math.prod(shape) * ITEMSIZE[kv_dtype]
        self.grow()

    @property
    def layers(self) -> int:
        """See ``CacheBuffers.layers``."""
        return len(self._aliases)

    def grow(self) -> bool:
        """See ``CacheBuffers.grow``."""
        if self.layers == self._layers:
            return False
        pair = [mx.zeros(self._shape, self._carrier) for _ in range(2)]
        mx.eval(pair)
        self._arrays.append(pair)
        self._aliases.append([np.array(array, copy=False)[0] for array in pair])
        return True

    def plane(self, layer: int, plane: int) -> NDArray[Any]:
        """See ``CacheBuffers.plane``."""
        if self._staging is not None:
            self._staging.finish()
        return self._aliases[layer][plane]

    def rows(self, layer: int, plane: int, heads: slice, tokens: slice) -> Rows:
        """See ``CacheBuffers.rows``."""
        place = self._aliases[layer][plane][heads, tokens]
        slot = self._staging.acquire(place) if self._staging is not None else None
        if slot is not None:
            return Rows([slot.buffer], slot.written, slot.dropped)
        return Rows([row.data.cast("B") for row in place])

    def build(self, dtype: mx.Dtype) -> list[Any]:
        """See ``CacheBuffers.build``."""
        if self._staging is not None:
            self._staging.finish()
        # An alias that outlives this makes MLX copy the buffer at the first decode step.
        self._aliases = []
        arrays, self._arrays = self._arrays, []
        caches = []
        for pair in arrays:
            keys, values = (array.view(self._dtype) for array in pair)
            pair.clear()
            if dtype != self._dtype:
                # One layer at a time: there need not be room for the whole cache twice.
                keys, values = keys.astype(dtype), values.astype(dtype)
                mx.eval(keys, values)
            caches.append(JoinableKVCache.holding(keys, values, self._tokens))
        mx.eval([(cache.keys, cache.values) for cache in caches])
        return caches


class JoinableKVCache(KVCache):
    """A ``KVCache`` that enters an empty batch without being copied.

    mlx-lm's own ``merge`` copies every cache into a fresh array of exactly its length, which the
    next step then reallocates once more.
    """

    @classmethod
    def holding(cls, keys: mx.array, values: mx.array, tokens: int) -> JoinableKVCache:
        """A cache over ``keys`` and ``values`` ``[1, heads, capacity, head_dim]``."""
        cache = cls()
        cache.keys, cache.values, cache.offset = keys, values, tokens
        return cache

    @classmethod
    def merge(cls, caches: Sequence[KVCache]) -> BatchKVCache:
        """The caches as one batch; a single one gives its buffers away."""
        if len(caches) > 1 or caches[0].keys is None:
            batch = JoinableBatchKVCache.merge(caches)
            batch.padded = len({cache.size() for cache in caches}) > 1
            return batch
        (only,) = caches
        batch = JoinableBatchKVCache([0])
        batch.keys, batch.values = only.keys, only.values
        batch.offset = batch.offset + only.offset
        batch._idx = only.offset
        only.keys = only.values = None
        return batch


class JoinableBatchKVCache(BatchKVCache):
    """A ``BatchKVCache`` that avoids two costs of the common case.

    Filtering that keeps every row copies nothing, and a batch without padding needs no mask.
    """

    def __init__(self, left_padding: list[int]) -> None:
        super().__init__(left_padding)
        self.padded = any(left_padding)

    def filter(self, batch_indices: Sequence[int]) -> None:
        """Keep the given rows."""
        if list(batch_indices) == list(range(self.offset.shape[0])):
            return
        super().filter(batch_indices)
        self.padded = any(self.left_padding.tolist())

    def extend(self, other: BatchKVCache) -> None:
        """Append the other batch's rows, padding the shorter on the left."""
        padded = self.padded or getattr(other, "padded", True) or self._idx != other._idx
        super().extend(other)
        self.padded = padded

    def finalize(self) -> None:
        """Turn right padding into left padding."""
        self.padded = self.padded or self._right_padding is not None
        super().finalize()

    def make_mask(self, N: int, return_array: bool = False, **kwargs: Any) -> mx.array | None:
        """None for one new token after equally long rows, else the causal mask."""
        if N == 1 and not self.padded and not return_array and not kwargs.get("window_size"):
            return None
        return super().make_mask(N, return_array=return_array, **kwargs)
