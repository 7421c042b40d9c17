"""Caches of a kind that no adapter knows: MLX decodes its own prompts with them, nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_receiver.caches.adapter import wire_dtype
from mlx_receiver.caches.model import CacheBuffers, Earlier, ModelCache, UnknownCache, known_layout
from mlx_receiver.wire.layout import DTYPES, MAX_PARTS, CacheLayout, LayerLayout, Part


class LocalCache(ModelCache):
    """See ``ModelCache``; how much such a cache takes is estimated from one that holds a token."""

    def __init__(self, caches: Sequence[Any], make: Callable[[], list[Any]]) -> None:
        """``make`` is what mlx-lm makes them with."""
        self.layout = CacheLayout([known_layout(cache) or _estimate(cache) for cache in caches])
        self._make = make
        self.batched = all(hasattr(cache, "merge") for cache in caches)

    def nbytes(self, tokens: int, headroom: int, itemsize: int) -> int:
        return self.layout.nbytes(tokens + headroom, itemsize)

    @property
    def branches(self) -> bool:
        """Nothing is kept."""
        return False

    def resumes(self, layout: CacheLayout) -> bool:
        """Nothing is kept."""
        return False

    def allocate(
        self, layout: CacheLayout, tokens: int, headroom: int, before: Earlier | None = None
    ) -> CacheBuffers:
        """Nothing can arrive. Raises UnknownCache."""
        raise UnknownCache("nothing is known of this model's cache")

    def empty(self) -> list[Any]:
        return self._make()


def _estimate(cache: Any) -> LayerLayout:
    """Arrays ``[1, heads, 1, width]`` have a row for each token, others are of the whole text."""
    parts = []
    for name, array in tree_flatten(cache.state):
        if not isinstance(array, mx.array) or wire_dtype(array) not in DTYPES:
            continue
        by_token = array.ndim == 4 and array.shape[2] == 1
        width = array.shape[-1] if array.ndim else 1
        rows = max(1, prod(array.shape[:-1]))
        parts.append(Part(name or "state", rows, width, wire_dtype(array), by_token))  # type: ignore[arg-type]
    kind = type(cache).__name__
    return LayerLayout(kind, parts[:MAX_PARTS] or [Part("none", 1, 1, DTYPES[0], False)])
