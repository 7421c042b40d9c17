"""Cohere2's window as vLLM has it, beside transformers with as long a one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_receiver.decode.model import find_model, load_model
from mlx_receiver.decode.windows import as_vllm_has_them
from mlx_receiver.wire.layout import FULL, WINDOW
from tests import families
from tests.conftest import cached_family

torch = pytest.importorskip("torch", reason="transformers computes with it")


@pytest.fixture(scope="module")
def model() -> Path:
    return cached_family("cohere2")


def by_transformers(model: Path, folder: Path, prompt: list[int], window: int) -> Any:
    """The logits after the last token, of the model with another window."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(model, folder)
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window": window}))
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return loaded.eval()(torch.tensor([prompt])).logits[0, -1].numpy()


def test_one_token_more_than_the_configuration_says(model: Path, tmp_path: Path) -> None:
    loaded = load_model(find_model(str(model)))
    layout = loaded.cache.layout
    window = families.WINDOW + 1
    assert [layer.kind for layer in layout.layers] == [WINDOW] * 3 + [FULL]
    assert {part.window for part in layout.layers[0].parts} == {window}

    prompt = [1 + (7 * i) % 500 for i in range(100)]
    cache = loaded.cache.empty()
    logits = np.array(loaded.model(mx.array([prompt]), cache=cache)[0, -1])
    same = by_transformers(model, tmp_path / "same", prompt, window)
    np.testing.assert_allclose(logits, same, atol=1e-3)
    other = by_transformers(model, tmp_path / "other", prompt, window - 1)
    assert np.abs(logits - other).max() > 0.1


def test_other_windows_are_left_alone() -> None:
    assert as_vllm_has_them({"model_type": "gemma3_text", "sliding_window": 48}) == {}
    assert as_vllm_has_them({"model_type": "cohere2", "sliding_window": None}) == {}
