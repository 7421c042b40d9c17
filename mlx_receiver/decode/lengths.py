"""Lengths from which on mlx-lm and vLLM compute a model otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_receiver.wire.layout import text_config


def computed_alike(config: Mapping[str, Any], tokens: int) -> int:
    """Of texts of up to so many ``tokens``, how long those are of which both compute the same.

    Ministral 3's queries grow with their position, from ``original_max_position_embeddings`` on.
    mlx-lm follows its ``config.json`` in that; vLLM 0.32 knows it from Mistral's own
    ``params.json`` only (its ``mistral.py``, ``llama_4_scaling``). The proof's prompt is too short
    to tell.
    """
    rope = text_config(config).get("rope_parameters")
    if isinstance(rope, Mapping) and rope.get("llama_4_scaling_beta"):
        first = rope.get("original_max_position_embeddings")
        if isinstance(first, int) and first > 0:
            return min(first, tokens)
    return tokens
