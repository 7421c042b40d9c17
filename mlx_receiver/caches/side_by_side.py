"""Layers that keep several caches, such as a recurrent one beside K and V: mlx-lm's
``CacheList``. Their kind is that of each, joined by ``+``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import CacheList
from numpy.typing import NDArray

from mlx_receiver.caches.adapter import CacheAdapter, LayerBuffers, Rows
from mlx_receiver.wire.layout import LayerLayout, beside, sides


class SideBySide:
    """See ``CacheAdapter``; made of the adapters of each cache."""

    def __init__(self, members: Sequence[CacheAdapter]) -> None:
        self._members = members
        self.kind = "+".join(member.kind for member in members)
        self.batched = all(getattr(member, "batched", True) for member in members)

    def layout(self, cache: Any) -> LayerLayout | None:
        """See ``CacheAdapter.layout``."""
        if type(cache) is not CacheList or len(cache.caches) != len(self._members):
            return None
        members = [m.layout(one) for m, one in zip(self._members, cache.caches, strict=True)]
        found = [layer for layer in members if layer is not None]
        return beside(found) if len(found) == len(members) else None

    def nbytes(self, layer: LayerLayout, tokens: int, headroom: int, itemsize: int) -> int:
        """See ``CacheAdapter.nbytes``."""
        return sum(
            member.nbytes(side, tokens, headroom, itemsize)
            for member, side in zip(self._members, sides(layer), strict=True)
        )

    def allocate(self, layer: LayerLayout, tokens: int, headroom: int) -> SideBySideBuffers:
        """See ``CacheAdapter.allocate``."""
        return SideBySideBuffers(
            [
                (member.allocate(side, tokens, headroom), len(side.parts))
                for member, side in zip(self._members, sides(layer), strict=True)
            ]
        )

    def empty(self, layer: LayerLayout) -> Any:
        """See ``CacheAdapter.empty``."""
        return CacheList(
            *(m.empty(side) for m, side in zip(self._members, sides(layer), strict=True))
        )

    def parts(self, layer: LayerLayout, cache: Any, tokens: int) -> list[mx.array]:
        """See ``CacheAdapter.parts``."""
        return [
            part
            for member, side, one in zip(self._members, sides(layer), cache.caches, strict=True)
            for part in member.parts(side, one, tokens)
        ]


class SideBySideBuffers:
    """Each cache's memory, and how many parts it has."""

    def __init__(self, members: Sequence[tuple[LayerBuffers, int]]) -> None:
        self._members = list(members)
        self._of = [(buffers, index) for buffers, parts in self._members for index in range(parts)]

    def part(self, index: int) -> NDArray[Any]:
        """See ``LayerBuffers.part``."""
        buffers, own = self._of[index]
        return buffers.part(own)

    def rows(self, index: int, heads: slice, tokens: slice) -> Rows:
        """See ``LayerBuffers.rows``."""
        buffers, own = self._of[index]
        return buffers.rows(own, heads, tokens)

    def build(self, dtypes: Sequence[mx.Dtype]) -> tuple[Any, list[mx.array]]:
        """See ``LayerBuffers.build``."""
        self._of = []
        caches, arrays = [], []
        while self._members:
            buffers, parts = self._members.pop(0)
            cache, held = buffers.build(dtypes[:parts])
            dtypes = dtypes[parts:]
            caches.append(cache)
            arrays += held
        return CacheList(*caches), arrays
