"""Gemma 2 in batches, in MLX."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import BatchKVCache, make_prompt_cache
from mlx_lm.utils import load_model as mlx_load

from mlx_receiver.decode.masks import group_masks
from mlx_receiver.decode.model import find_model, load_model
from tests.conftest import cached_family

pytest.importorskip("torch", reason="transformers makes the model with it")

LONG = [1 + (7 * i) % 500 for i in range(40)]
SHORT = LONG[5:20]


def together(model: Any) -> np.ndarray:
    """The last logits of both texts, as rows of one batch."""
    missing = len(LONG) - len(SHORT)
    cache = [BatchKVCache([0, missing]) for _ in model.layers]
    rows = mx.array([LONG, [0] * missing + SHORT])
    model(rows[:, :-1], cache=cache)
    return np.array(model(rows[:, -1:], cache=cache))[:, -1]


def apart(model: Any) -> np.ndarray:
    """The same, each text by itself."""
    texts = (mx.array([text]) for text in (LONG, SHORT))
    return np.concatenate([np.array(model(text, cache=make_prompt_cache(model)))[:, -1]
                           for text in texts])  # fmt: skip


def test_rows_are_what_they_are_alone() -> None:
    model = load_model(find_model(str(cached_family("gemma2")))).model
    np.testing.assert_allclose(together(model), apart(model), atol=1e-3)


def test_those_of_mlx_lm_are_not() -> None:
    """It takes as many rows as there are KV heads, and each row's mask for one head's; any other
    number of rows it refuses. Once it does neither, ``decode/masks.py`` may go."""
    as_mlx_lm_loads_it, _ = mlx_load(cached_family("gemma2"))
    wrong = np.abs(together(as_mlx_lm_loads_it) - apart(as_mlx_lm_loads_it)).max()
    assert wrong > 0.1


def test_other_models_have_their_masks() -> None:
    assert group_masks(None, {"model_type": "gemma3_text"}) == 0
