"""A whole model's cache: each layer by the adapter of its kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import CacheList
from numpy.typing import NDArray

from mlx_receiver import plugins
from mlx_receiver.caches.adapter import (
    Before,
    CacheAdapter,
    LayerBuffers,
    Rows,
    branching,
    mlx_dtype,
    resuming,
)
from mlx_receiver.caches.side_by_side import side_by_side
from mlx_receiver.wire.layout import ITEMSIZE, CacheLayout, Held, LayerLayout, Part, beside, checked
from mlx_receiver.wire.messages import E_INTERNAL, WireError


class UnknownCache(Exception):
    """No adapter is there for a layer; the text says which."""


@dataclass(frozen=True, slots=True)
class Earlier:
    """An earlier text's caches, one a layer; see ``Before``."""

    caches: Sequence[Any]
    tokens: int
    held: Held
    alone: bool

    def of(self, layer: int) -> Before:
        """One layer's."""
        return Before(self.caches[layer], self.tokens, self.held, self.alone)


class CacheBuffers:
    """One session's cache memory.

    It is allocated layer by layer, so that the first block need not wait for the last layer.
    """

    def __init__(
        self,
        layout: CacheLayout,
        own: CacheLayout,
        adapters: Sequence[CacheAdapter],
        tokens: int,
        headroom: int,
        before: Earlier | None = None,
    ) -> None:
        """Its first layer is allocated, the others are not; ``own`` is the layout that it is
        decoded in, and ``adapters`` has one for each layer. It begins with what ``before`` has."""
        self._layout = layout
        self._own = own
        self._adapters = adapters
        self._before = before
        self._tokens, self._headroom = tokens, headroom
        self._made: list[LayerBuffers] = []
        self.grow()

    @property
    def layers(self) -> int:
        """Layers that are allocated."""
        return len(self._made)

    def grow(self) -> bool:
        """Allocate one more layer; False when all are there."""
        index = self.layers
        if index == len(self._layout.layers):
            return False
        layer, adapter = self._layout.layers[index], self._adapters[index]
        if self._before is None:
            buffers = adapter.allocate(layer, self._tokens, self._headroom)
        else:
            found = resuming(adapter)
            assert found is not None  # see ``ModelCache.resumes``
            earlier = self._before.of(index)
            buffers = found.resume(layer, earlier, self._tokens, self._headroom)
        self._made.append(buffers)
        if self.layers == len(self._layout.layers):
            self._before = None
        return True

    def part(self, layer: int, part: int) -> NDArray[Any]:
        """See ``LayerBuffers.part``."""
        return self._made[layer].part(part)

    def rows(self, layer: int, part: int, heads: slice, tokens: slice) -> Rows:
        """See ``LayerBuffers.rows``."""
        return self._made[layer].rows(part, heads, tokens)

    def build(self) -> list[Any]:
        """Every layer's cache, in the dtypes that it is decoded in; see ``LayerBuffers.build``."""
        made, self._made = self._made, []
        caches, arrays = [], []
        for layer in self._own.layers:
            # Nothing but its cache may own a layer's memory.
            cache, held = made.pop(0).build([mlx_dtype(part.dtype) for part in layer.parts])
            caches.append(cache)
            arrays += held
        mx.eval(arrays)
        return caches


class ModelCache:
    """How one loaded model keeps its cache: what ``CacheBuffers`` and local prefills start from."""

    def __init__(self, layout: CacheLayout, known: Sequence[CacheAdapter] | None = None) -> None:
        """By the adapters that are ``known``, else by those that are installed. Raises
        UnknownCache."""
        self.layout = layout
        by_kind: dict[str, CacheAdapter] = {}
        for adapter in known or adapters():
            by_kind.setdefault(adapter.kind, adapter)
        self._adapters: list[CacheAdapter] = []
        for index, layer in enumerate(layout.layers):
            members = [by_kind.get(kind) for kind in layer.kind.split("+")]
            found = [member for member in members if member is not None]
            if len(found) < len(members):
                raise UnknownCache(f"layer {index} is of the kind {layer.kind!r}")
            self._adapters.append(found[0] if len(found) == 1 else side_by_side(found))
        self._resuming = [resuming(adapter) for adapter in self._adapters]
        self._branching = [branching(adapter) for adapter in self._adapters]
        #: Whether several such caches can be decoded in one step.
        self.batched = all(getattr(adapter, "batched", True) for adapter in self._adapters)
        #: Equal layers together: a budget asks for the sum at every step.
        self._groups: list[tuple[CacheAdapter, LayerLayout, int]] = []
        for adapter, layer in zip(self._adapters, layout.layers, strict=True):
            if self._groups and self._groups[-1][1] == layer:
                self._groups[-1] = (adapter, layer, self._groups[-1][2] + 1)
            else:
                self._groups.append((adapter, layer, 1))

    @classmethod
    def of(cls, caches: Sequence[Any]) -> ModelCache:
        """From what mlx-lm made for the model, once it holds a token. Raises UnknownCache."""
        return cls(CacheLayout([_layer(index, cache) for index, cache in enumerate(caches)]))

    def nbytes(self, tokens: int, headroom: int, itemsize: int) -> int:
        """Bytes of a session's memory. Raises WireError (``internal``) where an adapter fails."""
        try:
            return sum(
                count * int(adapter.nbytes(layer, tokens, headroom, itemsize))
                for adapter, layer, count in self._groups
            )
        except Exception as error:
            raise WireError(
                E_INTERNAL,
                f"how much memory {tokens} tokens take is not known: {error}",
            ) from error

    def allocate(
        self, layout: CacheLayout, tokens: int, headroom: int, before: Earlier | None = None
    ) -> CacheBuffers:
        """Memory for a client's ``layout``, which differs from this model's in dtypes, and in
        windows that are longer than the text (``CacheLayout.limit``). It begins with what
        ``before`` has, where the layout ``resumes``."""
        return CacheBuffers(layout, self.layout, self._adapters, tokens, headroom, before)

    def resumes(self, layout: CacheLayout) -> bool:
        """Whether a client's texts can continue earlier ones: every kind must know how, and what
        arrives must be what is decoded, since both lie in one array."""
        return None not in self._resuming and all(
            theirs.dtype == mine.dtype and theirs.scale == 1.0
            for of_theirs, of_mine in zip(layout.layers, self.layout.layers, strict=True)
            for theirs, mine in zip(of_theirs.parts, of_mine.parts, strict=True)
            if mine.by_token
        )

    def kept(self, caches: Sequence[Any]) -> tuple[list[Any], int]:
        """What of a text's caches is worth keeping, one a layer, and its bytes."""
        found = [
            adapter.kept(layer, cache) if adapter is not None else None
            for adapter, layer, cache in zip(
                self._resuming, self.layout.layers, caches, strict=True
            )
        ]
        return found, sum(int(cache.nbytes) for cache in found if cache is not None)

    @property
    def branches(self) -> bool:
        """Whether another text can begin like one that is decoded: its rows must not be lost to
        later ones."""
        return not any(
            part.bounded or (part.by_token and adapter is None)
            for adapter, layer in zip(self._branching, self.layout.layers, strict=True)
            for part in layer.parts
        )

    def beginning(self, layer: int, cache: Any, tokens: int) -> Any:
        """See ``BranchingAdapter.beginning``; None of a layer that keeps nothing."""
        adapter = self._branching[layer]
        return adapter and adapter.beginning(self.layout.layers[layer], cache, tokens)

    @property
    def lasts(self) -> bool:
        """Whether all of it has a row for each token: what a text left is of any of its
        beginnings."""
        return all(_lasts(part) for layer in self.layout.layers for part in layer.parts)

    @property
    def whole(self) -> bool:
        """Whether all of a text's cache is kept."""
        return all(part.by_token for layer in self.layout.layers for part in layer.parts)

    def lasting_bytes(self, tokens: int) -> int:
        """Bytes of so many tokens' rows in ``lasting_places``."""
        parts = (self.layout.layers[layer].parts[index] for layer, index in self.lasting_places)
        return sum(part.row * ITEMSIZE[part.dtype] for part in parts) * tokens

    @property
    def lasting_places(self) -> list[tuple[int, int]]:
        """Layer and part of all that has a row for each token."""
        return [
            (number, index)
            for number, layer in enumerate(self.layout.layers)
            for index, part in enumerate(layer.parts)
            if _lasts(part)
        ]

    def lasting(self, kept: Sequence[Any], tokens: int) -> dict[tuple[int, int], mx.array]:
        """What was kept of a text of so many tokens in ``lasting_places``, each ``[heads, tokens,
        width]``."""
        places = self.lasting_places
        parts = {number: self.parts(number, kept[number], tokens) for number, _ in places}
        return {(number, index): parts[number][index] for number, index in places}

    def room(self, kept: Sequence[Any]) -> int:
        """Tokens that what was kept has room for in its own memory."""
        rooms = [
            adapter.room(cache) if adapter is not None else 0
            for adapter, cache in zip(self._resuming, kept, strict=True)
        ]
        return min((room for room in rooms if room is not None), default=0)

    def empty(self) -> list[Any]:
        """Caches without tokens, one a layer."""
        return [
            adapter.empty(layer)
            for adapter, layer in zip(self._adapters, self.layout.layers, strict=True)
        ]

    def parts(self, layer: int, cache: Any, tokens: int) -> list[mx.array]:
        """See ``CacheAdapter.parts``."""
        return self._adapters[layer].parts(self.layout.layers[layer], cache, tokens)


def adapters() -> list[CacheAdapter]:
    """Every installed cache adapter, the built-in ones last: the first that knows a cache owns
    it."""
    return plugins.added("mac_decode_cache_adapters", "kind") or builtin_adapters()


def builtin_adapters() -> list[CacheAdapter]:
    """Those that come with this package."""
    from mlx_receiver.caches.chunk import ChunkKV
    from mlx_receiver.caches.plain import PlainKV
    from mlx_receiver.caches.states import States
    from mlx_receiver.caches.window import WindowKV

    return [PlainKV(), WindowKV(), ChunkKV(), States()]


def known_layout(cache: Any) -> LayerLayout | None:
    """The layout of a cache that holds a token, if an adapter knows its kind, or that of each that
    it consists of."""
    if type(cache) is CacheList:
        members = [known_layout(member) for member in cache.caches]
        found = [layer for layer in members if layer is not None]
        return beside(found) if len(found) == len(members) else None
    for adapter in adapters():
        try:
            layout = adapter.layout(cache)
            if layout is not None:
                return checked(layout)
        except Exception as error:
            plugins.blame(plugins.named(adapter), "cannot say what a cache holds", error)
    return None


def _lasts(part: Part) -> bool:
    return part.by_token and not part.bounded


def _layer(index: int, cache: Any) -> LayerLayout:
    layout = known_layout(cache)
    if layout is None:
        raise UnknownCache(f"layer {index} has a {type(cache).__name__}, which no adapter knows")
    return layout
