"""Settings that published models have and the families' own small ones do not: every token is that
of MLX alone, or nothing is handed off and the reason is named."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.e2e.handing_off import LENGTHS, OUTPUT, PROMPTS, Offline, by_mlx_alone, hand_off
from tests.e2e.test_families import as_mlx_alone
from tests.families import FAMILIES, VOCABULARY, write
from tests.servers import start_receiver

pytestmark = pytest.mark.server

ALL: Final = bool(os.environ.get("MAC_DECODE_ALL_FAMILIES"))

_LLAMA3: Final = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
_YARN: Final = {
    "rope_type": "yarn", "rope_theta": 1_000_000.0, "factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def _longrope(original: int) -> dict[str, Any]:
    """Phi-4-mini's, of heads of 32 of which 24 numbers are rotated."""
    rope = {
        "rope_type": "longrope", "type": "longrope", "rope_theta": 10_000.0,
        "partial_rotary_factor": 0.75, "original_max_position_embeddings": original,
        "short_factor": [1.0 + 0.05 * i for i in range(12)],
        "long_factor": [1.0 + 1.5 * i for i in range(12)],
    }  # fmt: skip
    return {"rope_parameters": rope, "partial_rotary_factor": 0.75, "sliding_window": None,
            "original_max_position_embeddings": original}  # fmt: skip


_QWEN3_5: Final = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000_000.0,
                        "partial_rotary_factor": 0.25, "mrope_section": [3, 3, 2],
                        "mrope_interleaved": True},
    "head_dim": 64, "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "full_attention_interval": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "attn_output_gate": True,
}  # fmt: skip

#: A family, and what is set otherwise.
VARIANTS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    # Llama 3.1's rotation; heads that are not the hidden size's share, one KV head, biases, an odd
    # vocabulary.
    "llama": (
        "llama",
        {"rope_parameters": _LLAMA3, "head_dim": 64, "num_key_value_heads": 1, "vocab_size": 509,
         "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "qwen3-yarn": ("qwen3", {"rope_parameters": _YARN, "head_dim": 64}),
    "phi3-longrope": ("phi3", _longrope(128) | {"tie_word_embeddings": True}),
    # As of 4B on; the scale of queries is not that of the heads, the window is odd.
    "gemma3-linear": (
        "gemma3",
        {"rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0}},
         "query_pre_attn_scalar": 42, "sliding_window": 47},
    ),
    "olmo3-yarn": (
        "olmo3",
        {"rope_parameters": _YARN | {"factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0,
                                     "attention_factor": 0.1 * math.log(8) + 1}},
    ),
    "exaone4-llama3": ("exaone4", {"rope_parameters": _LLAMA3, "head_dim": 64}),
    # DeepSeek's own YaRN, with as much scale on the rotated as on all; experts in groups.
    "deepseek_v3-yarn": (
        "deepseek_v3",
        {"rope_parameters": _YARN | {"factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0,
                                     "mscale": 1.0, "mscale_all_dim": 1.0},
         "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
    ),
    # muP: Falcon-H1-0.5B's.
    "falcon_h1-multipliers": (
        "falcon_h1",
        {"attention_in_multiplier": 1.0, "attention_out_multiplier": 0.9375,
         "embedding_multiplier": 5.656854249492381, "key_multiplier": 0.390625,
         "lm_head_multiplier": 0.0390625, "mlp_multipliers": [0.8838834764831844, 0.5859375],
         "ssm_in_multiplier": 1.25, "ssm_out_multiplier": 0.23570226039551587,
         "ssm_multipliers": [0.3535533905932738, 0.25, 0.3535533905932738, 0.5,
                             0.3535533905932738]},
    ),
    # Granite 4.0 H Tiny and Small.
    "granitemoehybrid-experts": (
        "granitemoehybrid",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "embedding_multiplier": 12.0,
         "residual_multiplier": 0.22, "logits_scaling": 8.0, "tie_word_embeddings": True},
    ),
    # Gemma 4 31B, whose full attention has no weights for values, and 26B-A4B.
    "gemma4-k_eq_v": (
        "gemma4",
        {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "num_kv_shared_layers": 0,
         "hidden_size_per_layer_input": 0, "final_logit_softcapping": 30.0},
    ),
    "gemma4-experts": (
        "gemma4",
        {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "num_kv_shared_layers": 0,
         "hidden_size_per_layer_input": 0, "enable_moe_block": True, "num_experts": 4,
         "top_k_experts": 2, "moe_intermediate_size": 64},
    ),
    # Qwen3.5: most layers are recurrent, a quarter of each head is rotated, by three positions that
    # are one in a text. 35B-A3B, and the smaller ones.
    "qwen3_5_moe-35b": (
        "qwen3_5_moe",
        _QWEN3_5 | {"num_attention_heads": 8, "num_experts": 16, "num_experts_per_tok": 8},
    ),
    "qwen3_5-tied": ("qwen3_5", _QWEN3_5 | {"tie_word_embeddings": True}),
    # Layers for several tokens at once are not loaded. The heads are no power of two.
    "glm4_moe-air": (
        "glm4_moe",
        {"num_attention_heads": 12, "num_key_value_heads": 1, "n_routed_experts": 8,
         "num_experts_per_tok": 8, "use_qk_norm": False, "num_nextn_predict_layers": 1,
         "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0,
                             "partial_rotary_factor": 0.5}},
    ),
    "glm4_moe_lite-flash": (
        "glm4_moe_lite",
        {"num_attention_heads": 5, "num_key_value_heads": 5, "qk_nope_head_dim": 48,
         "v_head_dim": 64, "n_routed_experts": 8, "num_experts_per_tok": 4,
         "num_nextn_predict_layers": 1,
         "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}},
    ),
    "gemma4-e2b": (
        "gemma4",
        {"use_double_wide_mlp": True, "num_key_value_heads": 1, "num_kv_shared_layers": 3,
         "final_logit_softcapping": 30.0},
    ),
}  # fmt: skip

#: The others on request, since each takes half a minute.
USUAL: Final = {"llama"}


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Offline]:
    made = Offline(tmp_path_factory.mktemp("offline") / "vllm.log")
    yield made
    made.close()


@pytest.mark.parametrize("name", [name for name in VARIANTS if ALL or name in USUAL])
def test_tokens_are_those_of_mlx_alone(name: str, offline: Offline, tmp_path: Path) -> None:
    family, others = VARIANTS[name]
    as_mlx_alone(hand_off(family, offline, tmp_path, **others), offline)


@pytest.mark.skipif(not ALL, reason="it takes a minute (MAC_DECODE_ALL_FAMILIES=1)")
def test_queries_that_grow_with_their_position(offline: Offline, tmp_path: Path) -> None:
    """Ministral 3's in MLX, not in vLLM: what is longer than their beginning is vLLM's."""
    first = LENGTHS[0] + 10
    rope = FAMILIES["ministral3"][1]["rope_parameters"]
    others = {"rope_parameters": rope | {"original_max_position_embeddings": first}}
    model = write("ministral3", tmp_path / "model", **others)
    expected, answer = offline.alone_and_together(
        model, tmp_path / "receiver.log", prompts=PROMPTS, tokens=OUTPUT
    )
    assert answer["tokens"] == expected
    assert answer["handed_off"] == first - LENGTHS[0] - 1


@pytest.mark.skipif(not ALL, reason="it takes half a minute (MAC_DECODE_ALL_FAMILIES=1)")
def test_mistrals_own_format(offline: Offline, tmp_path: Path) -> None:
    """vLLM reads ``params.json``, which its configuration has no type of model from."""
    model = write("mistral", tmp_path / "model")
    params = {
        "dim": 128, "n_layers": 4, "head_dim": 32, "hidden_dim": 128, "n_heads": 4, "n_kv_heads": 2,
        "rope_theta": 10_000.0, "norm_eps": 1e-6, "vocab_size": VOCABULARY,
        "tied_embeddings": False, "max_position_embeddings": 1024,
    }  # fmt: skip
    (model / "params.json").write_text(json.dumps(params))
    receiver = start_receiver(model, tmp_path / "receiver.log")
    try:
        expected = [by_mlx_alone(receiver, prompt) for prompt in PROMPTS]
        answer = offline.run(
            model=str(model), receiver=receiver.address, prompts=PROMPTS, tokens=OUTPUT,
            options={"config_format": "mistral"},
        )  # fmt: skip
    finally:
        receiver.server.stop()
    assert answer["tokens"] == expected
    assert answer["handed_off"] == len(PROMPTS) * (OUTPUT - 1), offline.said()


@pytest.mark.skipif(not ALL, reason="it takes half a minute (MAC_DECODE_ALL_FAMILIES=1)")
def test_a_rotation_for_texts_that_vllm_does_not_have(offline: Offline, tmp_path: Path) -> None:
    """vLLM rotates by Phi's factors for short texts where ``max_model_len`` is no more than those;
    mlx-lm knows the factors for long ones only."""
    model = write("phi3", tmp_path / "model", **_longrope(768))
    order = {"model": str(model), "prompts": PROMPTS[:1], "tokens": 4, "connect": 20}
    receiver = start_receiver(model, tmp_path / "receiver.log")
    try:
        answer = offline.run(receiver=receiver.address, **order)
    finally:
        receiver.server.stop()
    assert answer["handed_off"] == 0
    assert "layer 0, keys: " in offline.said() and "do not compute the same" in offline.said()
