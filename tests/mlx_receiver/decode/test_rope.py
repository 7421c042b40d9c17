"""YaRN as the model's configuration has it, beside transformers' own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.rope_utils import YarnRoPE, initialize_rope

from mlx_receiver.decode.rope import unround_yarn


class Model(nn.Module):
    """One rotary embedding, as mlx-lm makes it."""

    def __init__(self, dims: int, scaling: dict[str, Any]) -> None:
        super().__init__()
        self.rope = initialize_rope(dims, 150_000.0, False, scaling, 131_072)


def reference(dims: int, scaling: dict[str, Any]) -> Any:
    pytest.importorskip("torch", reason="transformers computes with it")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = SimpleNamespace(
        rope_parameters=scaling | {"rope_theta": 150_000.0}, head_dim=dims, hidden_size=dims,
        num_attention_heads=1, max_position_embeddings=131_072,
        standardize_rope_params=lambda: None,
    )  # fmt: skip
    inverse, _ = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    return inverse.numpy()


@pytest.mark.parametrize("truncate", [False, True, None])
@pytest.mark.parametrize(("dims", "factor", "context"), [(64, 32.0, 4096), (32, 8.0, 128)])
def test_the_ramp_is_the_configurations(
    truncate: bool | None, dims: int, factor: float, context: int
) -> None:
    scaling: dict[str, Any] = {
        "rope_type": "yarn", "factor": factor, "beta_fast": 32.0, "beta_slow": 1.0,
        "original_max_position_embeddings": context,
    }  # fmt: skip
    if truncate is not None:
        scaling["truncate"] = truncate
    model = Model(dims, scaling)
    assert type(model.rope) is YarnRoPE
    before = np.array(model.rope._freqs)
    config = {"rope_scaling": scaling, "rope_theta": 150_000.0}
    assert unround_yarn(model, config) == (1 if truncate is False else 0)
    after = np.array(model.rope._freqs)
    np.testing.assert_allclose(1 / after, reference(dims, scaling), rtol=2e-6)
    assert (truncate is False) == (not np.allclose(before, after, rtol=1e-3))


def test_other_embeddings_are_left_alone() -> None:
    model = Model(64, {"rope_type": "linear", "factor": 2.0})
    assert unround_yarn(model, {"rope_scaling": {"truncate": False}}) == 0
