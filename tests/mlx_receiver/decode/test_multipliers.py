"""Falcon-H1's multipliers in MLX, beside transformers' own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm import convert
from mlx_lm.utils import load_model as mlx_load

from mlx_receiver.decode.model import find_model, load_model
from mlx_receiver.decode.multipliers import multiply_keys
from tests import families

torch = pytest.importorskip("torch", reason="transformers computes with it")

PROMPT = [1 + (7 * i) % 500 for i in range(40)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose keys and values are multiplied."""
    folder = tmp_path_factory.mktemp("falcon") / "model"
    return families.write("falcon_h1", folder, key_multiplier=0.1, attention_in_multiplier=2.0)


def logits(loaded: Any) -> np.ndarray:
    return np.array(loaded(mx.array([PROMPT]))[0, -1])


@pytest.fixture(scope="module")
def wanted(model: Path) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        found: np.ndarray = loaded.eval()(torch.tensor([PROMPT])).logits[0, -1].numpy()
    return found


def test_they_are_transformers_own(model: Path, wanted: np.ndarray) -> None:
    loaded = load_model(find_model(str(model)))
    np.testing.assert_allclose(logits(loaded.model), wanted, atol=1e-3)
    as_mlx_lm_loads_it, _ = mlx_load(model)
    assert np.abs(logits(as_mlx_lm_loads_it) - wanted).max() > 0.1


def test_of_quantised_weights(model: Path, wanted: np.ndarray, tmp_path: Path) -> None:
    """Which mlx-lm has multiplied when it quantised them, but for the keys' and values'."""
    folder = tmp_path / "quantised"
    convert(str(model), mlx_path=str(folder), quantize=True, q_bits=8)
    loaded = load_model(find_model(str(folder)))
    assert isinstance(loaded.model.layers[0].self_attn.k_proj.projection, nn.QuantizedLinear)
    apart = np.abs(logits(loaded.model) - wanted).max() / np.abs(wanted).max()
    plain, _ = mlx_load(folder)
    assert apart < 0.05 < np.abs(logits(plain) - wanted).max() / np.abs(wanted).max()


class Model(nn.Module):
    """An mlx-lm that multiplies the weights by itself."""

    def __init__(self, multiplied: Callable[[str, mx.array], mx.array]) -> None:
        super().__init__()
        layer = nn.Module()
        layer.self_attn = nn.Module()
        layer.self_attn.k_proj = nn.Linear(4, 4, bias=False)
        layer.self_attn.v_proj = nn.Linear(4, 4, bias=False)
        self.layers = [layer]
        self._multiplied = multiplied

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        return {name: self._multiplied(name, weight) for name, weight in weights.items()}


def test_what_mlx_lm_multiplies_is_left_alone() -> None:
    config = {"model_type": "falcon_h1", "key_multiplier": 0.5, "attention_in_multiplier": 2.0}
    factors = {"k_proj": 1.0, "v_proj": 2.0}
    model = Model(lambda name, weight: weight * factors.get(name.split(".")[-2], 1.0))
    assert multiply_keys(model, config) == 0
    assert multiply_keys(Model(lambda name, weight: weight), config) == 1  # 0.5 * 2 is 1
    assert multiply_keys(model, {"model_type": "llama", "key_multiplier": 0.5}) == 0


def test_published_ones_without_such_multipliers(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    loaded, _ = mlx_load(model)
    assert multiply_keys(loaded, config | {"key_multiplier": 1, "attention_in_multiplier": 2.0}) > 0
