"""mlx-lm's plain caches, changed where batching them copies more than it must."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, KVCache


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

    def extract(self, idx: int) -> KVCache:
        """One row's cache. That of the only one is not copied: it must leave the batch."""
        if self.offset.shape[0] > 1 or self.padded or self._right_padding is not None:
            return super().extract(idx)
        return JoinableKVCache.holding(self.keys, self.values, self._idx)

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
