"""Multipliers that mlx-lm leaves out of a model's weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_receiver.wire.layout import text_config


class Times(nn.Module):
    """A projection whose outputs are multiplied: its weights may be quantised."""

    def __init__(self, projection: nn.Module, factor: float) -> None:
        super().__init__()
        self.projection = projection
        self._factor = factor

    def __call__(self, x: mx.array) -> mx.array:
        """Project."""
        found: mx.array = self.projection(x)
        return found * self._factor


def multiply_keys(model: Any, config: Mapping[str, Any]) -> int:
    """Let Falcon-H1's keys and values have the multipliers of its configuration, as in vLLM.

    mlx-lm 0.32 multiplies the weights when it loads them, but looks for the keys' under a name that
    they do not have, and multiplies no values. Returns how many projections were changed.
    """
    c = text_config(config)
    if c.get("model_type") != "falcon_h1":
        return 0
    inputs, keys = (float(c.get(f"{name}_multiplier") or 1.0) for name in ("attention_in", "key"))
    changed = 0
    for layer in model.layers:
        for name, wanted in (("k_proj", inputs * keys), ("v_proj", inputs)):
            factor = wanted / _multiplied(model, name)
            if factor != 1.0:
                attention = layer.self_attn
                setattr(attention, name, Times(getattr(attention, name), factor))
                changed += 1
    return changed


def _multiplied(model: Any, name: str) -> float:
    """What mlx-lm multiplies that projection's weights by when it loads them."""
    weights = {
        # That of a convolution tells weights as they are published from mlx-lm's own.
        "model.layers.0.mamba.conv1d.weight": mx.ones((2, 1, 4)),
        f"model.layers.0.self_attn.{name}.weight": mx.ones((1, 1)),
    }
    found = model.sanitize(weights)[f"model.layers.0.self_attn.{name}.weight"]
    return float(found.item())
