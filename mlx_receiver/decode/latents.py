"""Latents that mlx-lm expands before it keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.deepseek_v3 import DeepseekV3Attention
from mlx_lm.models.mla import MultiLinear

from mlx_receiver.wire.layout import text_config

#: What both kinds of attention have: numbers, and layers.
_SHARED: Final = (
    "num_heads", "q_lora_rank", "qk_rope_head_dim", "kv_lora_rank", "v_head_dim",
    "qk_nope_head_dim", "q_head_dim", "scale", "rope", "q_proj", "q_a_proj", "q_a_layernorm",
    "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "o_proj",
)  # fmt: skip


class LatentAttention(DeepseekV3Attention):  # type: ignore[misc]
    """DeepSeek-V3's attention, which keeps latents and rotated keys, with DeepSeek-V2's weights."""

    def __init__(self, expanding: Any) -> None:
        nn.Module.__init__(self)
        for name in _SHARED:
            if hasattr(expanding, name):
                setattr(self, name, getattr(expanding, name))
        heads, keys, values = self.num_heads, self.qk_nope_head_dim, self.v_head_dim
        weight = _unquantised(expanding.kv_b_proj).reshape(heads, keys + values, self.kv_lora_rank)
        self.embed_q = MultiLinear(keys, self.kv_lora_rank, heads)
        self.embed_q.weight = mx.contiguous(weight[:, :keys].swapaxes(-1, -2))
        self.unembed_out = MultiLinear(self.kv_lora_rank, values, heads)
        self.unembed_out.weight = mx.contiguous(weight[:, keys:])

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """``[batch, tokens, hidden size]``. DeepSeek-V2 may give a mask by its name."""
        if isinstance(mask, str):
            mask = create_causal_mask(x.shape[1], 0 if cache is None else cache.offset)
        found: mx.array = super().__call__(x, mask, cache)
        return found


def keep_latents(model: Any, config: Mapping[str, Any]) -> int:
    """Let DeepSeek-V2 keep the latent and the rotated key of each token, as vLLM does.

    mlx-lm 0.32 computes keys and values of all heads from the latent and keeps those: 9 times as
    much in DeepSeek-V2-Lite, and nothing that vLLM's cache could be. Returns how many layers were
    changed.
    """
    if text_config(config).get("model_type") != "deepseek_v2":
        return 0
    for layer in model.layers:
        layer.self_attn = LatentAttention(layer.self_attn)
    return len(model.layers)


def _unquantised(projection: nn.Module) -> mx.array:
    """``[outputs, inputs]``: rounded once more, the parts of it would be other numbers."""
    if not isinstance(projection, nn.QuantizedLinear):
        weight: mx.array = projection.weight
        return weight
    return mx.dequantize(
        projection.weight,
        projection.scales,
        projection.get("biases"),
        group_size=projection.group_size,
        bits=projection.bits,
        mode=projection.mode,
    )
