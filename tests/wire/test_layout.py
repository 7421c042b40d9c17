"""The cache's layout, from what a model's configuration says."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from mlx_receiver.wire.layout import LayerLayout, full_attention, layout_from_config, merged

LLAMA = {"num_attention_heads": 8, "num_hidden_layers": 3, "hidden_size": 64}


@pytest.mark.parametrize(
    ("more", "heads", "width"),
    [
        ({}, 8, 8),
        ({"num_key_value_heads": 2}, 2, 8),
        ({"head_dim": 32}, 8, 32),
        ({"text_config": {"num_key_value_heads": 4, "head_dim": 16}}, 4, 16),
    ],
)
def test_what_a_configuration_promises(more: dict[str, Any], heads: int, width: int) -> None:
    layout = layout_from_config({**LLAMA, **more}, "bfloat16")
    assert [(part.name, part.heads, part.width) for part in layout.layers[2].parts] == [
        ("keys", heads, width),
        ("values", heads, width),
    ]
    assert layout.bytes_per_token == 3 * 2 * heads * width * 2
    assert layout.nbytes(10, 4) == 10 * 3 * 2 * heads * width * 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_hidden_layers": 0}, "no cache has that shape.*length >= 1"),
        ({"num_hidden_layers": 10**6}, "no cache has that shape.*length <= 4096"),
        ({"num_key_value_heads": -1}, "no cache has that shape.*>= 1"),
        ({"head_dim": 1 << 30}, "no cache has that shape"),
    ],
)
def test_what_no_model_has(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        layout_from_config({**LLAMA, **changes}, "bfloat16")


@pytest.mark.parametrize("change", [{"scale": 0.5}, {"dtype": "float16"}, {"width": 4}])
def test_workers_that_disagree_are_no_model(change: dict[str, Any]) -> None:
    """Their heads would be read with each other's scale."""
    (layer,) = full_attention(1, 2, 8, "float32").layers
    other = [msgspec.structs.replace(part, heads=4) for part in layer.parts]
    assert merged([{0: layer}, {0: LayerLayout(layer.kind, other)}]).layers[0].parts == other
    wrong = [msgspec.structs.replace(part, **change) for part in other]
    with pytest.raises(ValueError, match="layer 0 is not the same in every worker"):
        merged([{0: layer}, {0: LayerLayout(layer.kind, wrong)}])
