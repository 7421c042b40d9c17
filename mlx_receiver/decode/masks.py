"""Masks of attention that mlx-lm does not fit to a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_receiver.wire.layout import text_config


class GroupedMask(nn.Module):
    """Attention that computes queries by the KV head that they share, and is given a mask without
    that axis."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """``[batch, tokens, hidden size]``, with a mask of ``[batch, 1, tokens, keys]`` or
        ``[tokens, keys]``."""
        if isinstance(mask, mx.array) and mask.ndim == 4:
            mask = mx.expand_dims(mask, 2)
        found: mx.array = self.attention(x, mask, cache)
        return found


def group_masks(model: Any, config: Mapping[str, Any]) -> int:
    """Let Gemma 2 be decoded in batches: mlx-lm 0.32 refuses their masks, or takes those of as many
    rows as there are KV heads for the heads' and computes something else.

    Returns how many layers were changed.
    """
    if text_config(config).get("model_type") != "gemma2":
        return 0
    changed = 0
    for layer in model.layers:
        if layer.self_attn.repeats > 1:
            layer.self_attn = GroupedMask(layer.self_attn)
            changed += 1
    return changed
