"""Rotary embeddings that mlx-lm computes otherwise than the model's configuration says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
from mlx_lm.models.rope_utils import YarnRoPE

from mlx_receiver.wire.layout import text_config


def unround_yarn(model: Any, config: Mapping[str, Any]) -> int:
    """Let YaRN's ramp begin and end between two rotations where the configuration says
    ``truncate: false``, as gpt-oss's does: mlx-lm 0.32 rounds both bounds, and keys that vLLM has
    rotated would not fit.

    The formula is that of YaRN (Peng et al., 2023, section 3.2), as in transformers'
    ``_compute_yarn_parameters`` and vLLM's ``rotary_embedding/common.py``. Returns how many
    embeddings were changed.
    """
    c = text_config(config)
    scaling = {**(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}
    if scaling.get("truncate") is not False:
        return 0
    base = float(scaling.get("rope_theta") or c.get("rope_theta") or 10_000.0)
    factor = float(scaling.get("factor", 1.0))
    context = int(scaling.get("original_max_position_embeddings") or 4096)
    turns = float(scaling.get("beta_fast") or 32.0), float(scaling.get("beta_slow") or 1.0)
    changed = 0
    for _, module in model.named_modules():
        if type(module) is YarnRoPE:
            module._freqs = _frequencies(module.dims, base, factor, context, turns)
            changed += 1
    return changed


def _frequencies(
    dims: int, base: float, factor: float, context: int, turns: tuple[float, float]
) -> mx.array:
    """``[dims / 2]``: what a position is divided by, before its sine and cosine."""
    low, high = (
        dims * math.log(context / (turn * 2 * math.pi)) / (2 * math.log(base)) for turn in turns
    )
    low, high = max(low, 0.0), min(high, float(dims - 1))
    ramp = mx.clip((mx.arange(dims // 2, dtype=mx.float32) - low) / max(high - low, 0.001), 0, 1)
    own = base ** (mx.arange(0, dims, 2, dtype=mx.float32) / dims)
    return 1.0 / ((1.0 - ramp) / own + ramp / (factor * own))


def halve_pairs(model: Any, config: Mapping[str, Any]) -> int:
    """Let Llama 4 rotate number ``i`` of a head with number ``i + head_dim / 2``, and not with its
    neighbour: vLLM does, with the weights of queries and keys in another order (its ``llama4.py``,
    ``permute_qk_weight_for_rotary``), and its cache has the keys in that order.

    The scores are the same. Returns how many layers were changed.
    """
    c = text_config(config)
    if not str(c.get("model_type")).startswith("llama4"):
        return 0
    changed = 0
    for layer in model.layers:
        attention = layer.self_attn
        for projection, heads in (
            (attention.q_proj, attention.n_heads),
            (attention.k_proj, attention.n_kv_heads),
        ):
            # Rows are outputs, also those of quantised weights, their scales and biases.
            for name, array in projection.parameters().items():
                setattr(projection, name, _even_then_odd(array, heads))
        if attention.use_rope:
            attention.rope.traditional = False
        changed += 1
    return changed


def _even_then_odd(rows: mx.array, heads: int) -> mx.array:
    """``[heads * head_dim, ...]`` with each head's even rows before its odd ones."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return mx.swapaxes(pairs, 1, 2).reshape(rows.shape)
