"""A small random Llama whose greedy text wanders, to decode without a model of the user's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Final

CONFIG: Final[dict[str, Any]] = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}

PROMPT: Final = [int(token) for token in range(3, 500, 31)]


def write(folder: Path) -> None:
    """Write its configuration and float32 weights, the same ones each time."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models.llama import Model, ModelArgs

    weights = {}
    # On the CPU, so that what is compared later does not come from what is being checked.
    with mx.stream(mx.cpu):
        for index, (name, weight) in enumerate(
            tree_flatten(Model(ModelArgs(**CONFIG)).parameters())
        ):
            drawn = mx.random.normal(weight.shape, key=mx.random.key(index))
            if weight.ndim == 1:
                weights[name] = mx.ones(weight.shape)
            elif "embed" in name:
                weights[name] = drawn
            else:
                gain = 3.0 if "lm_head" in name else 1.4
                weights[name] = drawn * (gain / math.sqrt(weight.shape[1]))
        mx.eval(weights)
        mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
