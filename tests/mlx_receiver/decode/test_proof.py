"""What counts of the difference between two caches."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_receiver.decode.model import LoadedModel, find_model, load_model
from mlx_receiver.decode.proof import compare

TOKENS = list(range(100, 164))


@pytest.fixture(scope="module")
def loaded(tiny_llama_path: Path) -> LoadedModel:
    return load_model(find_model(str(tiny_llama_path)), "float32")


def verdict(loaded: LoadedModel, change: Any, layer: int = 2) -> tuple[bool, str]:
    """Of caches that are the model's own, but for a layer's values."""
    caches = loaded.cache.empty()
    loaded.model(mx.array([TOKENS]), cache=caches)
    caches = [copy.copy(cache) for cache in caches]
    caches[layer].values = change(caches[layer].values)
    said = compare(loaded, TOKENS, caches, 5, ["float32"], "float32")
    return said.same, said.text


def tokens_moved(count: int, by: float = 1.01) -> Any:
    """Every fourth token's values, so many of them."""
    places = [4 * index for index in range(count)]

    def change(values: mx.array) -> mx.array:
        factors = mx.ones(values.shape[2])
        factors[mx.array(places)] = by
        return values * factors[:, None]

    return change


def test_a_few_tokens_may_go_through_other_experts(loaded: LoadedModel) -> None:
    """A quarter of the tokens, however far; no more."""
    routed = replace(loaded, experts=True)
    few = tokens_moved(16, 1.03)
    assert not verdict(loaded, few)[0]
    assert verdict(routed, few)[0]
    assert verdict(routed, few)[1].startswith("4 layers compared, at most 0 % apart")
    assert not verdict(routed, lambda values: values * 1.03)[0]
    assert not verdict(routed, lambda values: mx.roll(values, 1, axis=2))[0]
    assert verdict(routed, few, 1)[1].startswith("4 layers compared, at most 0 % apart")
    assert verdict(routed, few, 0)[1].startswith("layer 0, values"), "no expert comes before it"


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e30])
def test_one_token_that_is_no_number(loaded: LoadedModel, number: float) -> None:
    routed = replace(loaded, experts=True)
    same, text = verdict(routed, tokens_moved(1, number))
    assert not same and text.startswith("layer 2, values: nan % apart")


def test_who_has_experts(tmp_path: Path, tiny_llama_path: Path) -> None:
    from tests.families import write

    assert load_model(find_model(str(write("qwen3_moe", tmp_path / "moe")))).experts
    assert not load_model(find_model(str(tiny_llama_path))).experts
