"""Models whose configuration is spelt as transformers 5 writes it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_receiver.decode.model import find_model, load_model
from mlx_receiver.decode.spelling import older_spelling
from tests import families

pytest.importorskip("torch", reason="transformers writes the models with it")

#: Another rotation than mlx-lm assumes, for the families whose own is that.
OTHERS: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0,
                                  "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                  "original_max_position_embeddings": 64}},
    "qwen2": {"rope_parameters": {"rope_type": "default", "rope_theta": 20_000.0}},
    "qwen3_moe": {"rope_parameters": {"rope_type": "default", "rope_theta": 20_000.0}},
    "glm4_moe": {"rope_parameters": {"rope_type": "default", "rope_theta": 20_000.0}},
    "minimax_m2": {"rope_parameters": {"rope_type": "default", "rope_theta": 20_000.0}},
    "exaone4": {"rope_parameters": {"rope_type": "default", "rope_theta": 20_000.0}},
    "gemma3": {"rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 20_000.0, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 20_000.0}}},
    "granitemoehybrid": {"num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip

#: Keys of the older spelling alone.
OLDER = ("rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor",
         "num_experts")  # fmt: skip


def logits(folder: Path) -> np.ndarray:
    loaded = load_model(find_model(str(folder)))
    tokens = [1 + (7 * i) % 500 for i in range(70)]
    return np.array(loaded.model(mx.array([tokens]))[0, -1])


@pytest.mark.parametrize("family", OTHERS)
def test_both_spellings_are_one_model(family: str, tmp_path: Path) -> None:
    older = families.write(family, tmp_path / "older", **OTHERS[family])
    later = tmp_path / "later"
    shutil.copytree(older, later)
    config = json.loads((older / "config.json").read_text())
    written = families.as_transformers_writes(family, **OTHERS[family])
    for key in OLDER:
        if key not in written:
            config.pop(key, None)
    config |= written
    (later / "config.json").write_text(json.dumps(config))
    np.testing.assert_array_equal(logits(later), logits(older))


def test_what_a_configuration_has_is_left_alone() -> None:
    assert older_spelling({"rope_theta": 1.0, "rope_scaling": None}) == {}
    later = {"rope_parameters": {"rope_type": "default", "rope_theta": 2.0}}
    assert older_spelling({"rope_theta": 1.0, **later}) == {"rope_scaling": None}
    inside = {"text_config": {"hidden_size": 8, **later}}
    assert older_spelling(inside) == {
        "text_config": {**inside["text_config"], "rope_theta": 2.0, "rope_scaling": None}
    }
