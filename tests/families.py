"""Small random models of many families that vLLM and mlx-lm both run, in Hugging Face format.

Each has what is particular to its family's cache: windows, norms, biases, partial or interleaved
rotation, experts.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any, Final

from tests import composites
from tests.models import TOKENIZER_FILES, save

#: Raise it with every change of what is written: caches are keyed by it.
GENERATOR_VERSION: Final = 13

VOCABULARY: Final = 512
WINDOW: Final = 48
#: A multiple of vLLM's blocks.
CHUNK: Final = 64

_SHARED: Final[dict[str, Any]] = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_size": 128,
    "intermediate_size": 128,
    "max_position_embeddings": 1024,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "tie_word_embeddings": False,
    "vocab_size": VOCABULARY,
}
_ROPE: Final = {"rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"}}
#: As gpt-oss has it: the ramp begins and ends between two rotations.
_YARN: Final = {
    "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 128, "truncate": False,
}  # fmt: skip
#: A pattern that is not the same from the front and from the back.
_MIXED: Final = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
_EXPERTS: Final = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}

#: transformers' class, and what its configuration has beside the shared.
FAMILIES: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "llama": ("Llama", _ROPE),
    "qwen2": ("Qwen2", _ROPE | {"use_sliding_window": False}),
    "qwen3": ("Qwen3", _ROPE),
    "mistral": ("Mistral", _ROPE | {"sliding_window": None}),
    "mistral-window": ("Mistral", _ROPE | {"sliding_window": WINDOW}),
    "mixtral": ("Mixtral", _ROPE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3Moe", _ROPE | _EXPERTS | {"norm_topk_prob": True}),
    "phi3": ("Phi3", _ROPE | {"sliding_window": None}),
    "glm4": ("Glm4", _ROPE | {"partial_rotary_factor": 0.5}),
    "glm4_moe": (
        "Glm4Moe",
        _ROPE | {"partial_rotary_factor": 0.5, "n_routed_experts": 4, "num_experts_per_tok": 2,
                 "moe_intermediate_size": 64, "n_group": 1, "topk_group": 1,
                 "first_k_dense_replace": 1, "n_shared_experts": 1, "routed_scaling_factor": 1.0,
                 "norm_topk_prob": True, "use_qk_norm": True, "attention_bias": True},
    ),
    "granite": (
        "Granite",
        _ROPE | {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 1.0,
                 "attention_multiplier": 0.2},
    ),
    "olmo2": ("Olmo2", _ROPE),
    "seed_oss": ("SeedOss", _ROPE),
    "ernie4_5": ("Ernie4_5", _ROPE),
    "smollm3": ("SmolLM3", _ROPE | {"no_rope_layer_interval": 2, "use_sliding_window": False}),
    "olmo3": ("Olmo3", _ROPE | {"sliding_window": WINDOW, "layer_types": _MIXED}),
    "exaone4": (
        "Exaone4",
        _ROPE | {"sliding_window": WINDOW, "sliding_window_pattern": "LLGL", "layer_types": _MIXED},
    ),
    "cohere2": (
        "Cohere2",
        _ROPE | {"sliding_window": WINDOW, "sliding_window_pattern": 4, "logit_scale": 0.5,
                 "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
                 "tie_word_embeddings": True},
    ),
    # Queries are longer from the 256th token on, as the published ones' from the 16,384th.
    "ministral3": (
        "Ministral3",
        {"rope_parameters": {
            "rope_type": "yarn", "type": "yarn", "rope_theta": 1_000_000.0, "factor": 16.0,
            "original_max_position_embeddings": 256, "beta_fast": 32.0, "beta_slow": 1.0,
            "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}},
    ),
    # Norms over all heads at once; half of each head is rotated.
    "minimax_m2": (
        "MiniMaxM2",
        _ROPE | {"rotary_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
                 "shared_intermediate_size": 0, "scoring_func": "sigmoid", "use_qk_norm": True,
                 "use_routing_bias": True},
    ),
    "gpt_oss": (
        "GptOss",
        {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2,
         "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": _YARN},
    ),
    "gemma3": (
        "Gemma3",
        {"sliding_window": WINDOW, "sliding_window_pattern": 4, "query_pre_attn_scalar": 32,
         "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
         "tie_word_embeddings": True, "num_hidden_layers": 8},
    ),
    # MLX attends to all where vLLM has a window, which is longer than these texts.
    "gemma2": (
        "Gemma2",
        _ROPE | {"sliding_window": 1024, "query_pre_attn_scalar": 32,
                 "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
                 "tie_word_embeddings": True},
    ),
    # Recurrent states beside K and V: Mamba 2, short convolutions, and both in each layer.
    "nemotron_h": (
        "NemotronH",
        {"hybrid_override_pattern": "M-M*M-", "num_hidden_layers": 6, "mamba_num_heads": 8,
         "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 2, "conv_kernel": 4,
         "layer_norm_epsilon": 1e-5, "use_conv_bias": True},
    ),
    "lfm2": (
        "Lfm2",
        _ROPE | {"layer_types": ["conv", "full_attention", "conv", "full_attention"],
                 "conv_L_cache": 3, "conv_bias": False, "conv_dim": 128, "block_dim": 128,
                 "block_ff_dim": 128, "block_auto_adjust_ff_dim": False,
                 "block_multiple_of": 64, "block_ffn_dim_multiplier": 1.0, "norm_eps": 1e-5,
                 "tie_word_embeddings": True},
    ),
    "falcon_h1": (
        "FalconH1",
        _ROPE | {"mamba_d_ssm": 256, "mamba_n_heads": 8, "mamba_d_head": 32, "mamba_n_groups": 2,
                 "mamba_d_state": 16, "mamba_d_conv": 4},
    ),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        {"layer_types": ["mamba", "attention", "mamba", "mamba"], "mamba_n_heads": 8,
         "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_d_conv": 4,
         "num_local_experts": 0, "shared_intermediate_size": 128, "num_experts_per_tok": 0,
         "attention_multiplier": 0.2, "position_embedding_type": "nope"},
    ),
    "jamba": (
        "Jamba",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
         "expert_layer_offset": 1, "num_experts": 4, "num_experts_per_tok": 2,
         "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 8,
         "use_mamba_kernels": False},
    ),
    "qwen3_next": (
        "Qwen3Next",
        _ROPE | {"layer_types": ["linear_attention", "full_attention"] * 2,
                 "linear_num_value_heads": 2, "linear_num_key_heads": 1, "linear_key_head_dim": 128,
                 "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "num_experts": 4,
                 "num_experts_per_tok": 2, "moe_intermediate_size": 64,
                 "shared_expert_intermediate_size": 64, "mlp_only_layers": [0, 1, 2],
                 "decoder_sparse_step": 1, "full_attention_interval": 2},
    ),
    "qwen3_5": (
        "Qwen3_5",
        _ROPE | {"layer_types": ["linear_attention", "full_attention"] * 2,
                 "linear_num_value_heads": 3, "linear_num_key_heads": 1, "linear_key_head_dim": 128,
                 "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
                 "full_attention_interval": 2, "mamba_ssm_dtype": "float32"},
    ),
    "qwen3_5_moe": (
        "Qwen3_5Moe",
        _ROPE | {"layer_types": ["linear_attention", "full_attention"] * 2,
                 "linear_num_value_heads": 2, "linear_num_key_heads": 1, "linear_key_head_dim": 128,
                 "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "num_experts": 4,
                 "num_experts_per_tok": 2, "moe_intermediate_size": 64,
                 "shared_expert_intermediate_size": 64, "full_attention_interval": 2,
                 "mamba_ssm_dtype": "float32"},
    ),
    # Later layers read earlier ones' K and V.
    "gemma4": (
        "Gemma4",
        {"sliding_window": WINDOW, "num_hidden_layers": 6, "num_kv_shared_layers": 2,
         "layer_types": ["sliding_attention", "full_attention"] * 3, "global_head_dim": 64,
         "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 32,
         "tie_word_embeddings": True},
    ),
    "llama4": (
        "Llama4",
        _ROPE
        | {"attention_chunk_size": CHUNK, "num_local_experts": 2, "num_experts_per_tok": 1,
           "interleave_moe_layer_step": 2, "intermediate_size_mlp": 128, "use_qk_norm": True,
           "attn_temperature_tuning": True, "floor_scale": 64, "attn_scale": 0.1},
    ),
    "gemma3n": (
        "Gemma3n",
        {"sliding_window": WINDOW, "num_hidden_layers": 6, "num_kv_shared_layers": 2,
         "layer_types": ["sliding_attention", "full_attention"] * 3, "laurel_rank": 16,
         "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0, 0.0, 0.0],
         "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 32,
         "altup_num_inputs": 3, "tie_word_embeddings": True},
    ),
    # A latent and a rotated key instead of K and V.
    "deepseek_v3": (
        "DeepseekV3",
        _ROPE | {"kv_lora_rank": 512, "q_lora_rank": 64, "qk_rope_head_dim": 64,
                 "qk_nope_head_dim": 32, "v_head_dim": 32, "num_key_value_heads": 4,
                 "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
                 "moe_intermediate_size": 64, "first_k_dense_replace": 1, "head_dim": 64,
                 "n_shared_experts": 1, "routed_scaling_factor": 1.0, "topk_method": "noaux_tc",
                 "scoring_func": "sigmoid", "norm_topk_prob": True},
    ),
    # DeepSeek-V2-Lite's settings.
    "deepseek_v2": (
        "DeepseekV2",
        {"rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 40.0, "beta_fast": 32.0,
            "beta_slow": 1.0, "mscale": 0.707, "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 64},
         "kv_lora_rank": 512, "q_lora_rank": None, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32,
         "v_head_dim": 32, "num_key_value_heads": 4, "head_dim": 64, "n_routed_experts": 4,
         "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 64,
         "first_k_dense_replace": 1, "n_shared_experts": 2, "routed_scaling_factor": 1.0,
         "topk_method": "greedy", "norm_topk_prob": False},
    ),
    "glm4_moe_lite": (
        "Glm4MoeLite",
        _ROPE | {"kv_lora_rank": 512, "q_lora_rank": 64, "qk_rope_head_dim": 64,
                 "qk_nope_head_dim": 32, "v_head_dim": 48, "num_key_value_heads": 4,
                 "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
                 "moe_intermediate_size": 64, "first_k_dense_replace": 1, "head_dim": 64,
                 "n_shared_experts": 1, "routed_scaling_factor": 1.8, "norm_topk_prob": True,
                 "num_nextn_predict_layers": 0},
    ),
}  # fmt: skip


#: What is not compared token by token: the two sides' caches differ (and a test of its own says
#: how that goes); vLLM's CPU build lacks Mamba 1 and MiniMax's routing.
NOT_COMPARED: Final = ("mistral-window", "jamba", "minimax_m2")


def write(family: str, path: Path, dtype: str = "float32", seed: int = 0, **others: Any) -> Path:
    """Write the family's model; ``others`` go to its configuration."""
    import torch
    import transformers

    config = _configuration(family, others)
    model = getattr(transformers, f"{FAMILIES[family][0]}ForCausalLM")(config)
    _randomise(model, torch.Generator().manual_seed(seed))
    if family in ("gemma4", "gemma3n"):  # they multiply them by as much
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(config.hidden_size**-0.5)
            if family == "gemma3n":  # vLLM 0.32 leaves them out, where nothing but text comes
                model.model.embed_tokens_per_layer.weight.zero_()
    save(model, path, dtype)
    spell_for_mlx(path)
    if family == "gpt_oss":
        _write_experts_for_mlx(path)
    if family in composites.OUTER:
        composites.write(family, path)
    return path


def configuration(family: str) -> dict[str, Any]:
    """What ``write`` writes into ``config.json``, of what decides a cache's shape."""
    config = _configuration(family, {}).to_dict()
    _spell(config)
    return config


def as_transformers_writes(family: str, **others: Any) -> dict[str, Any]:
    """The same, and all else that is in it, as mlx-lm does not read it."""
    found: dict[str, Any] = _configuration(family, others).to_dict()
    return found


def _configuration(family: str, others: dict[str, Any]) -> Any:
    import transformers

    name, own = FAMILIES[family]
    config_class = getattr(transformers, f"{name}TextConfig", None) or getattr(
        transformers, f"{name}Config"
    )
    # transformers writes into what it is given.
    settings = copy.deepcopy({**_SHARED, **own, **others})
    if family == "gemma3" and "layer_types" not in others:
        settings["layer_types"] = own["layer_types"] * 2
    return config_class(**settings)


def _randomise(model: Any, generator: Any) -> None:
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1 or "norm" in name:
                weight.uniform_(0.7, 1.3, generator=generator)
                if "bias" in name or "sinks" in name:
                    weight.sub_(1.0)
            elif "embed_tokens" in name:
                weight.normal_(0.0, 1.0, generator=generator)
            else:
                gain = 3.0 if "lm_head" in name else 1.4
                weight.normal_(0.0, gain / math.sqrt(weight.shape[-1]), generator=generator)


def spell_for_mlx(path: Path) -> None:
    """mlx-lm reads the older spelling of rotary parameters, which the hub's files have."""
    file = path / "config.json"
    config = json.loads(file.read_text())
    _spell(config)
    file.write_text(json.dumps(config, indent=2) + "\n")


def _spell(config: dict[str, Any]) -> None:
    rope = config.get("rope_parameters") or {}
    if config["model_type"] == "gemma4_text":  # mlx-lm reads what the hub has of it
        full = config["per_layer_config"]["1"]
        config["global_head_dim"] = full["head_dim"]
        if "num_key_value_heads" in full:
            config["num_global_key_value_heads"] = full["num_key_value_heads"]
        return
    if any(isinstance(value, dict) for value in rope.values()):
        full, local = rope.get("full_attention"), rope.get("sliding_attention")
        if full:
            config.setdefault("rope_theta", full["rope_theta"])
            if full.get("rope_type", "default") != "default":
                config.setdefault("rope_scaling", full)
        if local:
            config.setdefault("rope_local_base_freq", local["rope_theta"])
    elif rope:
        config.setdefault("rope_theta", rope["rope_theta"])
        if "partial_rotary_factor" in rope:
            config.setdefault("partial_rotary_factor", rope["partial_rotary_factor"])
        if rope.get("rope_type", "default") != "default":
            config.setdefault("rope_scaling", rope)
    config.setdefault("rope_scaling", None)
    if config["model_type"] == "granitemoehybrid":
        names = {"linear_attention": "mamba", "full_attention": "attention"}
        config["layer_types"] = [names.get(kind, kind) for kind in config["layer_types"]]
    if "num_local_experts" in config:
        config.setdefault("num_experts", config["num_local_experts"])


def for_mlx(family: str, path: Path) -> Path:
    """The folder that mlx-lm loads, of the one that was written."""
    if family in (*composites.WHOLE, "gemma3n", "llama4"):
        return composites.folder(path)
    return path / "mlx" if family == "gpt_oss" else path


def for_vllm(family: str, path: Path) -> Path:
    """The same for vLLM."""
    return composites.folder(path) if family in composites.WHOLE else path


def _write_experts_for_mlx(path: Path) -> None:
    """mlx-lm reads gpt-oss's experts in MXFP4, or as it writes them itself."""
    from safetensors.torch import load_file, save_file

    weights = {}
    for name, value in load_file(path / "model.safetensors").items():
        if ".experts." not in name:
            weights[name] = value
            continue
        # ``[experts, in, out]`` and ``[experts, out]``; gate and up alternate.
        bias = name.endswith("_bias")
        value = value if bias else value.transpose(1, 2)
        stem, kind = name.removesuffix("_bias"), "bias" if bias else "weight"
        if "gate_up_proj" in stem:
            for start, part in enumerate(("gate_proj", "up_proj")):
                own = value[:, start::2].contiguous()
                weights[f"{stem.replace('gate_up_proj', part)}.{kind}"] = own
        else:
            weights[f"{stem}.{kind}"] = value.contiguous()
    (path / "mlx").mkdir()
    save_file(weights, path / "mlx" / "model.safetensors", metadata={"format": "pt"})
    for file in ("config.json", *TOKENIZER_FILES):
        shutil.copyfile(path / file, path / "mlx" / file)
