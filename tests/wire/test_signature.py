"""What two configurations must have in common."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_receiver.wire.signature import signature_from_config

LLAMA = {"model_type": "llama", "hidden_size": 64, "vocab_size": 100, "rope_theta": 5e5}
#: As vLLM has a model in Mistral's own format: of no type, and rotations in another spelling.
MISTRALS = {
    "model_type": "", "hidden_size": 64, "vocab_size": 100,
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, "attention_factor": 1.0},
}  # fmt: skip


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({}, ""),
        ({"model_type": "qwen3"}, "model_type: llama here, qwen3 there"),
        ({"rope_theta": 1e4}, "rope: {partial=1.0, theta=500000.0, type=default} here, "
                              "{partial=1.0, theta=10000.0, type=default} there"),
        ({"vocab_size": 99}, "vocab_size: 100 here, 99 there"),
        (MISTRALS, ""),
        (MISTRALS | {"hidden_size": 32}, "hidden_size: 64 here, 32 there"),
    ],
)  # fmt: skip
def test_what_differs_is_named(other: dict[str, Any], said: str) -> None:
    here, there = signature_from_config(LLAMA), signature_from_config(LLAMA | other)
    assert "; ".join(here.differences(there)) == said
    assert bool(there.differences(here)) == bool(said)


def test_both_spellings_of_a_rotation_are_one() -> None:
    nested = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    later = {key: value for key, value in LLAMA.items() if key != "rope_theta"} | nested
    assert signature_from_config(LLAMA) == signature_from_config(later)


@pytest.mark.parametrize(
    "spelled",
    [
        {"partial_rotary_factor": 0.25},
        {"rotary_pct": 0.25},
        {"rotary_dim": 32, "head_dim": 128},
        {"rope_parameters": {"partial_rotary_factor": 0.25, "rope_theta": 5e5}},
    ],
)
def test_every_name_of_a_partial_rotation(spelled: dict[str, Any]) -> None:
    """vLLM writes all of them into ``rope_parameters``; MiniMax-M2's file has the third."""
    vllms = {"rope_parameters": {"partial_rotary_factor": 0.25, "rope_theta": 5e5}} | spelled
    here, there = signature_from_config(LLAMA | spelled), signature_from_config(LLAMA | vllms)
    assert here.differences(there) == []
    assert here.differences(signature_from_config(LLAMA)) != []
