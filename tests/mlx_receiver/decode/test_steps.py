"""Granite's time steps in MLX, beside transformers' own."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model as mlx_load

from mlx_receiver.decode.model import find_model, load_model
from mlx_receiver.decode.steps import unlimited_steps
from tests import families

torch = pytest.importorskip("torch", reason="transformers computes with it")

PROMPT = [1 + (7 * i) % 500 for i in range(300)]


def with_small_steps(folder: Path) -> Path:
    """A model whose states forget next to nothing, with a configuration as they are published."""
    from safetensors.torch import load_file, save_file

    model = families.write("granitemoehybrid", folder)
    file = model / "model.safetensors"
    weights = load_file(file)
    for name, weight in weights.items():
        if name.endswith("dt_bias"):
            weights[name] = weight - 10.0
    save_file(weights, file, metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    del config["time_step_limit"]
    (model / "config.json").write_text(json.dumps(config))
    return model


def test_none_is_made_longer(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = with_small_steps(tmp_path / "model")
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        wanted = reference.eval()(torch.tensor([PROMPT])).logits[0, -1].numpy()
    loaded = load_model(find_model(str(model))).model
    np.testing.assert_allclose(np.array(loaded(mx.array([PROMPT]))[0, -1]), wanted, atol=1e-3)
    by_mlx_lm, _ = mlx_load(model)
    assert np.abs(np.array(by_mlx_lm(mx.array([PROMPT]))[0, -1]) - wanted).max() > 0.1


def test_a_limit_of_the_configuration_and_other_models_are_left_alone() -> None:
    assert unlimited_steps({"model_type": "granitemoehybrid", "time_step_limit": [0.01, 1]}) == {}
    assert unlimited_steps({"model_type": "nemotron_h"}) == {}
