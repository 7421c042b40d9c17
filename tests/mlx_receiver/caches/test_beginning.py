"""Copies of a text's first rows, while it is decoded: exact, and without moving what it has."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_receiver.caches.adapter import branching
from mlx_receiver.caches.joinable import JoinableKVCache
from mlx_receiver.caches.model import ModelCache
from mlx_receiver.caches.plain import PlainKV
from mlx_receiver.wire.layout import (
    RECURRENT,
    CacheLayout,
    LayerLayout,
    Part,
    beside,
    full_attention,
    windowed,
)

(LAYER,) = full_attention(1, 4, 8, "float32").layers


def address(array: mx.array) -> int:
    alias = np.array(array, copy=False)
    return int(alias.ctypes.data)


@pytest.mark.parametrize("lengths", [[500], [500, 500], [500, 130, 300]])
@pytest.mark.parametrize("tokens", [1, 100, 128, 130])
def test_what_is_decoded_stays_where_it_is(lengths: list[int], tokens: int) -> None:
    """An array that somebody else holds is copied whole at the next step."""
    whole = [[mx.random.normal((1, 4, 1024, 8)) for _ in range(2)] for _ in lengths]
    expected = [np.array(keys[0, :, :tokens]) for keys, _ in whole]
    rows = [
        JoinableKVCache.holding(keys + 0, values + 0, length)
        for (keys, values), length in zip(whole, lengths, strict=True)
    ]
    batch = JoinableKVCache.merge(rows)
    del rows, whole

    def step() -> int:
        new = mx.ones((len(lengths), 4, 1, 8))
        found = batch.update_and_fetch(new, new)
        mx.eval(found, batch.keys, batch.values)
        del found
        return address(batch.keys)

    step()
    before = step()
    for index in range(len(lengths)):
        row = batch.extract(index)
        copy = PlainKV().beginning(LAYER, row, tokens)
        del row
        assert step() == before
        assert copy.offset == tokens and copy.keys.shape[2] > tokens
        np.testing.assert_array_equal(np.array(copy.keys[0, :, :tokens]), expected[index])


STATE = LayerLayout(RECURRENT, [Part("state0", 2, 4, "float32", by_token=False)])


@pytest.mark.parametrize(
    ("layers", "branches"),
    [
        ([LAYER, LAYER], True),
        ([LAYER, STATE], True),  # the states travel anyhow
        ([LAYER, windowed(LAYER, 64)], False),  # decoding has overwritten the window
        ([beside([LAYER, STATE])], False),
    ],
)
def test_of_which_models(layers: list[LayerLayout], branches: bool) -> None:
    cache = ModelCache(CacheLayout(layers))
    assert cache.branches is branches
    assert STATE not in layers or cache.beginning(layers.index(STATE), None, 5) is None


def test_who_resumes_in_another_way_says_how() -> None:
    class Other(PlainKV):
        def resume(self, layer: Any, before: Any, tokens: int, headroom: int) -> Any: ...

    class Both(Other):
        def beginning(self, layer: Any, cache: Any, tokens: int) -> Any: ...

    found = {made: branching(made()) is not None for made in (PlainKV, Other, Both)}
    assert found == {PlainKV: True, Other: False, Both: True}
