"""DeepSeek-V2's latents in MLX, beside transformers' own arithmetic and mlx-lm's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm import convert
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model as mlx_load

from mlx_receiver.decode.latents import LatentAttention, keep_latents
from mlx_receiver.decode.model import find_model, load_model
from tests import families
from tests.conftest import cached_family

torch = pytest.importorskip("torch", reason="transformers computes with it")

PROMPT = [1 + (7 * i) % 500 for i in range(100)]


def logits(model: Any) -> np.ndarray:
    """Behind each token: of the first 60 at once, of 30 more at once, and of one after the
    other."""
    cache = make_prompt_cache(model)
    pieces = [PROMPT[:60], PROMPT[60:90], *([token] for token in PROMPT[90:])]
    return np.concatenate([np.array(model(mx.array([one]), cache=cache))[0] for one in pieces])


@pytest.mark.parametrize("others", [{}, {"q_lora_rank": 64}])
def test_they_are_transformers_own(others: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = families.write("deepseek_v2", tmp_path / "model", **others)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = reference(torch.tensor([PROMPT])).logits[0].numpy()
    loaded = load_model(find_model(str(model)))
    np.testing.assert_allclose(logits(loaded.model), wanted, atol=2e-3)
    for layer in loaded.cache.layout.layers:
        assert [(part.heads, part.width) for part in layer.parts] == [(1, 512), (1, 64)]


def test_of_quantised_weights(tmp_path: Path) -> None:
    """They are those numbers that mlx-lm multiplies with."""
    folder = tmp_path / "quantised"
    convert(str(cached_family("deepseek_v2")), mlx_path=str(folder), quantize=True, q_bits=4,
            q_group_size=32)  # fmt: skip
    as_mlx_lm_loads_it, _ = mlx_load(folder)
    assert isinstance(as_mlx_lm_loads_it.layers[0].self_attn.kv_b_proj, nn.QuantizedLinear)
    loaded = load_model(find_model(str(folder)))
    assert isinstance(loaded.model.layers[0].self_attn, LatentAttention)
    np.testing.assert_allclose(logits(loaded.model), logits(as_mlx_lm_loads_it), atol=2e-3)


def test_other_models_keep_what_they_keep() -> None:
    assert keep_latents(None, {"model_type": "deepseek_v3"}) == 0
