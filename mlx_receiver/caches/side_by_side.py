"""Layers that keep several caches, such as a recurrent one beside K and V: mlx-lm's
``CacheList``. Their kind is that of each, joined by ``+``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import CacheList
from numpy.typing import NDArray

from mlx_receiver.caches.adapter import (
    Before,
    CacheAdapter,
    LayerBuffers,
    ResumingAdapter,
    Rows,
    resuming,
)
from mlx_receiver.wire.layout import LayerLayout, beside, sides


class SideBySide:
    """See ``CacheAdapter``; made of the adapters of each cache."""

    def __init__(self, members: Sequence[CacheAdapter]) -> None:
        self._members = members
        self.kind = "+".join(member.kind for member in members)
        self.batched = all(getattr(member, "batched", True) for member in members)

    def layout(self, cache: Any) -> LayerLayout | None:
        if type(cache) is not CacheList or len(cache.caches) != len(self._members):
            return None
        members = [m.layout(one) for m, one in zip(self._members, cache.caches, strict=True)]
        found = [layer for layer in members if layer is not None]
        return beside(found) if len(found) == len(members) else None

    def nbytes(self, layer: LayerLayout, tokens: int, headroom: int, itemsize: int) -> int:
        return sum(
            member.nbytes(side, tokens, headroom, itemsize)
            for member, side in zip(self._members, sides(layer), strict=True)
        )

    def allocate(self, layer: LayerLayout, tokens: int, headroom: int) -> SideBySideBuffers:
        return SideBySideBuffers(
            [
                (member.allocate(side, tokens, headroom), len(side.parts))
                for member, side in zip(self._members, sides(layer), strict=True)
            ]
        )

    def empty(self, layer: LayerLayout) -> Any:
        return CacheList(
            *(m.empty(side) for m, side in zip(self._members, sides(layer), strict=True))
        )

    def parts(self, layer: LayerLayout, cache: Any, tokens: int) -> list[mx.array]:
        return [
            part
            for member, side, one in zip(self._members, sides(layer), cache.caches, strict=True)
            for part in member.parts(side, one, tokens)
        ]


class ResumingSideBySide(SideBySide):
    """See ``ResumingAdapter``; made of such adapters."""

    def __init__(self, members: Sequence[ResumingAdapter]) -> None:
        super().__init__(members)
        self._resuming = members

    def kept(self, layer: LayerLayout, cache: Any) -> CacheList:
        found = zip(self._resuming, sides(layer), cache.caches, strict=True)
        kept = (member.kept(side, one) for member, side, one in found)
        return CacheList(*(_Nothing() if one is None else one for one in kept))

    def parts(self, layer: LayerLayout, cache: Any, tokens: int) -> list[mx.array]:
        """See ``CacheAdapter.parts``; of what was not kept there is nothing."""
        nothing = mx.zeros((0,))
        return [
            part
            for member, side, one in zip(self._members, sides(layer), cache.caches, strict=True)
            for part in (
                [nothing] * len(side.parts)
                if isinstance(one, _Nothing)
                else member.parts(side, one, tokens)
            )
        ]

    def room(self, cache: Any) -> int | None:
        rooms = (m.room(one) for m, one in zip(self._resuming, cache.caches, strict=True))
        return min((room for room in rooms if room is not None), default=None)

    def resume(
        self, layer: LayerLayout, before: Before, tokens: int, headroom: int
    ) -> SideBySideBuffers:
        return SideBySideBuffers(
            [
                (member.resume(side, replace(before, cache=one), tokens, headroom), len(side.parts))
                for member, side, one in zip(
                    self._resuming, sides(layer), before.cache.caches, strict=True
                )
            ]
        )


def side_by_side(members: Sequence[CacheAdapter]) -> SideBySide:
    """The adapter of layers that keep such caches."""
    found = [known for member in members if (known := resuming(member)) is not None]
    return ResumingSideBySide(found) if len(found) == len(members) else SideBySide(members)


class _Nothing:
    """A cache of which nothing is kept."""

    nbytes = 0


class SideBySideBuffers:
    """See ``LayerBuffers``; made of each cache's memory, and how many parts it has."""

    def __init__(self, members: Sequence[tuple[LayerBuffers, int]]) -> None:
        self._members = list(members)
        self._of = [(buffers, index) for buffers, parts in self._members for index in range(parts)]

    def part(self, index: int) -> NDArray[Any]:
        buffers, own = self._of[index]
        return buffers.part(own)

    def rows(self, index: int, heads: slice, tokens: slice) -> Rows:
        buffers, own = self._of[index]
        return buffers.rows(own, heads, tokens)

    def build(self, dtypes: Sequence[mx.Dtype]) -> tuple[Any, list[mx.array]]:
        self._of = []
        caches, arrays = [], []
        while self._members:
            buffers, parts = self._members.pop(0)
            cache, held = buffers.build(dtypes[:parts])
            dtypes = dtypes[parts:]
            caches.append(cache)
            arrays += held
        return CacheList(*caches), arrays
