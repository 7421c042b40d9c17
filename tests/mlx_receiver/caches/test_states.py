"""States of recurrent layers, alone and beside K and V: MLX decodes from what has arrived."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache

from mlx_receiver.caches.model import ModelCache, UnknownCache
from mlx_receiver.sessions.coverage import Coverage
from mlx_receiver.wire.frames import Header, Kind
from mlx_receiver.wire.layout import CacheLayout, LayerLayout, Part, beside, sides

TOKENS = 11


def states(seed: int, dtype: mx.Dtype = mx.float32) -> ArraysCache:
    """A convolution's last three inputs, and four heads of ``[5, 6]``."""
    mx.random.seed(seed)
    cache = ArraysCache(2)
    cache.cache = [
        mx.random.normal((1, 3, 10)).astype(dtype),
        mx.random.normal((1, 4, 5, 6)),
    ]
    mx.eval(cache.cache)
    return cache


def keys_and_values(seed: int) -> KVCache:
    mx.random.seed(seed)
    cache = KVCache()
    cache.update_and_fetch(*(mx.random.normal((1, 2, TOKENS, 8)) for _ in range(2)))
    mx.eval(cache.keys, cache.values)
    return cache


def sent(model: ModelCache, caches: list[Any], layout: CacheLayout | None = None) -> list[Any]:
    """The caches, as they come out of the memory that their parts were written to."""
    buffers = model.allocate(layout or model.layout, TOKENS, 4)
    while buffers.grow():
        pass
    for index, (cache, layer) in enumerate(
        zip(caches, (layout or model.layout).layers, strict=True)
    ):
        for number, part in enumerate(model.parts(index, cache, TOKENS)):
            wanted = layer.parts[number].dtype
            array = part.astype({"float32": mx.float32, "bfloat16": mx.bfloat16}[wanted])
            carrier = mx.uint32 if wanted == "float32" else mx.uint16
            heads, rows, _ = part.shape
            place = buffers.rows(index, number, slice(0, heads), slice(0, rows))
            data = np.array(array.view(carrier))
            for row, buffer in zip(data, place.buffers, strict=True):
                buffer[:] = row.tobytes()
            del buffer
            place.buffers.clear()
            place.written()
    return buffers.build()


def test_the_layout_says_what_a_row_is() -> None:
    (layer,) = ModelCache.of([states(1)]).layout.layers
    assert layer == LayerLayout("recurrent", [
        Part("state0", 3, 1, "float32", False, rows=10),
        Part("state1", 4, 30, "float32", False, dims=[5, 6]),
    ])  # fmt: skip
    turned = LayerLayout("recurrent", [layer.parts[0], Part("state1", 4, 30, "float32", False, dims=[6, 5])])  # fmt: skip # noqa: E501
    assert CacheLayout([layer]).differences(CacheLayout([turned])) == [
        "layer 0, state1: dims: [5, 6] here, [6, 5] there"
    ]
    assert CacheLayout([layer]).nbytes(5) == CacheLayout([layer]).nbytes(5000) == 4 * 150


def test_only_a_convolution_has_a_row_for_each_channel() -> None:
    """Mamba 1's other state has three dimensions, too: its workers divide the heads."""
    cache = ArraysCache(2)
    cache.cache = [mx.zeros((1, 3, 10)), mx.zeros((1, 10, 16))]
    (layer,) = ModelCache.of([cache]).layout.layers
    shapes = [(part.heads, part.rows, part.width) for part in layer.parts]
    assert shapes == [(3, 10, 1), (10, 1, 16)]


def test_workers_may_send_some_channels_each() -> None:
    coverage = Coverage(ModelCache.of([states(1)]).layout, TOKENS)
    assert coverage.absent == 3 * 10 + 4
    conv = Header(Kind.BLOCK, 1, 0, dtype="float32", heads=3, width=1, tokens=6)
    assert not coverage.wrong(conv)
    assert coverage.arrived(coverage.at(conv)) == 18
    state = Header(Kind.BLOCK, 1, 0, part=1, dtype="float32", heads=4, width=30, tokens=1)
    coverage.arrived(coverage.at(state))
    assert coverage.missing() == "layer 0, state0, head 0, rows 6..9 (12 of 34 cells are missing)"
    rest = replace(conv, token_start=6, tokens=4)
    assert coverage.wrong(replace(rest, tokens=5)) == "it has 10 rows and no tokens"
    assert not coverage.wrong(rest)
    coverage.arrived(coverage.at(rest))
    assert coverage.absent == 0 and not coverage.missing()


def test_what_arrives_is_what_is_decoded_from() -> None:
    caches = [states(2), keys_and_values(3), CacheList(states(4), keys_and_values(5))]
    model = ModelCache.of(caches)
    kinds = [layer.kind for layer in model.layout.layers]
    assert kinds == ["recurrent", "full", "recurrent+full"]
    built = sent(model, caches)
    assert [type(cache).__name__ for cache in built] == [
        "ArraysCache", "JoinableKVCache", "CacheList",
    ]  # fmt: skip
    for index, (got, cache) in enumerate(zip(built, caches, strict=True)):
        for a, b in zip(
            model.parts(index, got, TOKENS), model.parts(index, cache, TOKENS), strict=True
        ):
            assert mx.array_equal(a, b)
    assert [array.shape for array in built[0].cache] == [(1, 3, 10), (1, 4, 5, 6)]
    assert built[2][1].offset == TOKENS


def test_each_part_is_decoded_in_its_own_dtype() -> None:
    """vLLM may keep a state in another precision than mlx-lm."""
    model = ModelCache.of([states(6, mx.bfloat16)])
    assert [part.dtype for part in model.layout.layers[0].parts] == ["bfloat16", "float32"]
    there = [
        Part("state0", 3, 1, "float32", False, rows=10),
        Part("state1", 4, 30, "bfloat16", False, dims=[5, 6]),
    ]
    layout = CacheLayout([LayerLayout("recurrent", there)])
    assert model.layout.differences(layout) == []
    (built,) = sent(model, [states(6, mx.bfloat16)], layout)
    assert [array.dtype for array in built.cache] == [mx.bfloat16, mx.float32]


def test_empty_ones_are_mlx_lms() -> None:
    model = ModelCache.of([states(7), CacheList(states(8), keys_and_values(9))])
    alone, both = model.empty()
    assert type(alone) is ArraysCache and alone.empty()
    assert type(both) is CacheList and len(both.caches) == 2 and both[1].offset == 0


def test_sides() -> None:
    one, two = ModelCache.of([states(1), keys_and_values(2)]).layout.layers
    both = beside([one, two])
    assert [part.name for part in both.parts] == ["0.state0", "0.state1", "1.keys", "1.values"]
    assert sides(both) == [one, two]


def test_a_list_of_something_unknown_is_unknown() -> None:
    with pytest.raises(UnknownCache, match="layer 0 has a CacheList"):
        ModelCache.of([CacheList(states(1), ArraysCache(1))])
