"""How long texts are of which both engines compute the same."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_receiver.decode.lengths import computed_alike

GROWING = {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16_384}


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({"rope_parameters": GROWING}, 16_384),
        ({"text_config": {"rope_parameters": GROWING}}, 16_384),
        ({"rope_parameters": GROWING | {"llama_4_scaling_beta": 0.0}}, 262_144),
        ({"rope_parameters": {"original_max_position_embeddings": 4096}}, 262_144),
        ({"rope_parameters": GROWING | {"original_max_position_embeddings": 1 << 20}}, 262_144),
        ({"rope_parameters": GROWING | {"original_max_position_embeddings": "long"}}, 262_144),
        ({"rope_parameters": None}, 262_144),
        ({}, 262_144),
    ],
)
def test_queries_that_grow(config: dict[str, Any], tokens: int) -> None:
    assert computed_alike(config, 262_144) == tokens
