"""Configurations as transformers 5 writes them, in the older spelling that mlx-lm reads.

The hub's older files have it, and so has what mlx-lm converted from them; fine-tunes that were
saved since then have not. What mlx-lm does not find it takes for its default: keys are rotated
wrongly, or the model does not load.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: What Granite 4 calls its layers there.
_LAYERS = {"linear_attention": "mamba", "full_attention": "attention"}


def older_spelling(config: Mapping[str, Any]) -> dict[str, Any]:
    """What to add to a model's configuration before mlx-lm reads it; nothing that it has is
    changed, but for names of Granite's layers."""
    text = config.get("text_config")
    if isinstance(text, Mapping):
        found = _spelled(text)
        return {"text_config": {**text, **found}} if found else {}
    return _spelled(config)


def _spelled(config: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    rope = config.get("rope_parameters")
    if isinstance(rope, Mapping):
        found |= _rotation(config, rope)
    experts = config.get("num_local_experts") or config.get("num_experts")
    if experts:
        found |= {"num_local_experts": experts, "num_experts": experts}
    found = {
        key: value
        for key, value in found.items()
        if key not in config or (config[key] is None and value is not None)
    }
    kinds = config.get("layer_types")
    if config.get("model_type") == "granitemoehybrid" and isinstance(kinds, list):
        names = [_LAYERS.get(kind, kind) for kind in kinds]
        if names != kinds:
            found["layer_types"] = names
    return found


def _rotation(config: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_parameters`` may be one for all layers, or one for each kind of them."""
    found: dict[str, Any] = {}
    if any(isinstance(value, Mapping) for value in rope.values()):
        local = rope.get("sliding_attention") or {}
        rope = rope.get("full_attention") or {}
        found["rope_local_base_freq"] = local.get("rope_theta")
    found["rope_theta"] = rope.get("rope_theta")
    found["partial_rotary_factor"] = partial = rope.get("partial_rotary_factor")
    if partial and isinstance(config.get("head_dim"), int):  # as MiniMax has it
        found["rotary_dim"] = int(config["head_dim"] * partial)
    found = {key: value for key, value in found.items() if value is not None}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    # Some models of mlx-lm's do not load without.
    found["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    return found
