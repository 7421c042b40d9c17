"""What two configurations must have in common."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from mlx_receiver.wire.layout import layout_from_config
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


#: What the hub's files of these models say of it.
PUBLISHED: dict[str, dict[str, Any]] = {
    "DeepSeek-V2-Lite": {
        "model_type": "deepseek_v2", "hidden_size": 2048, "vocab_size": 102_400,
        "num_attention_heads": 16, "num_hidden_layers": 27, "kv_lora_rank": 512,
        "q_lora_rank": None, "rope_theta": 10_000,
        "rope_scaling": {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1,
                         "mscale": 0.707, "mscale_all_dim": 0.707,
                         "original_max_position_embeddings": 4096},
    },
    "Gemma-3-4B": {
        "model_type": "gemma3",
        "text_config": {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34,
                        "intermediate_size": 10_240, "sliding_window": 1024,
                        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
    },
    "Gemma-3-12B": {
        "model_type": "gemma3",
        "text_config": {"model_type": "gemma3_text", "hidden_size": 3840, "num_hidden_layers": 48,
                        "num_attention_heads": 16, "num_key_value_heads": 8,
                        "intermediate_size": 15_360, "sliding_window": 1024,
                        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
    },
    "Qwen2.5-VL-7B": {
        "model_type": "qwen2_5_vl", "hidden_size": 3584, "vocab_size": 152_064,
        "num_attention_heads": 28, "num_key_value_heads": 4, "num_hidden_layers": 28,
        "intermediate_size": 18_944, "rope_theta": 1_000_000.0, "use_sliding_window": False,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    },
}  # fmt: skip


def vllms(name: str) -> dict[str, Any]:
    """A published configuration as transformers' class, and so vLLM, completes it."""
    transformers = pytest.importorskip("transformers")
    published = copy.deepcopy(PUBLISHED[name])
    whole = transformers.AutoConfig.for_model(published.pop("model_type"), **published)
    text: dict[str, Any] = whole.get_text_config().to_dict()
    return text


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_published_is_what_vllm_makes_of_it(name: str) -> None:
    here, there = signature_from_config(PUBLISHED[name]), signature_from_config(vllms(name))
    assert here.differences(there) == there.differences(here) == []


@pytest.mark.parametrize("name", ["Gemma-3-4B", "Gemma-3-12B"])
def test_what_gemma_3_leaves_to_its_class(name: str) -> None:
    """Sizes of the cache; that windows are left out is said of ``layout_from_config``."""
    here, there = (layout_from_config(c, "bfloat16") for c in (PUBLISHED[name], vllms(name)))
    sizes = [[(part.heads, part.width) for part in layer.parts] for layer in here.layers]
    assert sizes == [[(p.heads, p.width) for p in layer.parts] for layer in there.layers]


@pytest.mark.parametrize("named", ["deepseek_yarn", "deepseek_llama_scaling"])
def test_a_rotation_that_vllms_model_has_renamed(named: str) -> None:
    """In the configuration that the engine has, too, where both are one process (one GPU)."""
    there = vllms("DeepSeek-V2-Lite")
    there["rope_parameters"]["rope_type"] = named
    here = signature_from_config(PUBLISHED["DeepSeek-V2-Lite"])
    assert here.differences(signature_from_config(there)) == []
    there["rope_parameters"]["factor"] = 16
    assert "factor=40.0" in here.differences(signature_from_config(there))[0]
