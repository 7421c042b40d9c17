"""Published models: what of their ``config.json`` decides the cache's size, and where that stands.

Only shapes that a public source confirms. Keys and values are spelt as in ``config.json``; a
pattern is written out as its rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_NEMOTRON = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
#: A training framework, which lists the sizes of each model that it trains.
_SLIME = "scripts/models/{}.sh of THUDM/slime or of a fork of it"


@dataclass(frozen=True)
class Published:
    """One model, which vLLM serves in bf16."""

    name: str
    config: dict[str, Any]
    source: str

    @property
    def model_type(self) -> str:
        """The family."""
        return str(self.config["model_type"])


PUBLISHED = (
    Published(
        "Llama-3.1-8B",
        {"model_type": "llama", "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "head_dim": 128},
        _SLIME.format("llama3.1-8B"),
    ),
    Published(
        "Qwen3-235B-A22B",
        {"model_type": "qwen3_moe", "num_hidden_layers": 94, "num_attention_heads": 64,
         "num_key_value_heads": 4, "head_dim": 128},
        _SLIME.format("qwen3-235B-A22B"),
    ),
    Published(
        "GLM-4.5-Air",
        {"model_type": "glm4_moe", "num_hidden_layers": 46, "num_attention_heads": 96,
         "num_key_value_heads": 8, "head_dim": 128},
        _SLIME.format("glm4.5-106B-A12B") + "; the defaults of transformers' Glm4MoeConfig",
    ),
    Published(
        "gpt-oss-120b",
        {"model_type": "gpt_oss", "num_hidden_layers": 36, "num_attention_heads": 64,
         "num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128,
         "layer_types": ["sliding_attention", "full_attention"] * 18},
        "gpt_oss/torch/model.py of openai/gpt-oss; the defaults of transformers' GptOssConfig",
    ),
    Published(
        "Gemma-3-27B",
        {"model_type": "gemma3_text", "num_hidden_layers": 62, "num_attention_heads": 32,
         "num_key_value_heads": 16, "head_dim": 128, "sliding_window": 1024,
         "layer_types": [
             "sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(62)
         ]},
        "get_config_for_27b_v3 of google/gemma_pytorch",
    ),
    Published(
        "Gemma-4-31B",
        {"model_type": "gemma4_text", "num_hidden_layers": 60, "num_attention_heads": 32,
         "num_key_value_heads": 16, "head_dim": 256, "global_head_dim": 512,
         "num_global_key_value_heads": 4, "attention_k_eq_v": True, "num_kv_shared_layers": 0,
         "sliding_window": 1024,
         "layer_types": [
             "sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(60)
         ]},
        "its configuration as transformers 5.7 prints it; " + _SLIME.format("gemma4-31B"),
    ),
    Published(
        "DeepSeek-V3",
        {"model_type": "deepseek_v3", "num_hidden_layers": 61, "num_attention_heads": 128,
         "kv_lora_rank": 512, "qk_rope_head_dim": 64},
        _SLIME.format("deepseek-v3") + "; the defaults of transformers' DeepseekV3Config",
    ),
    Published(
        "Nemotron-3-Nano-30B-A3B",
        {"model_type": "nemotron_h", "num_hidden_layers": 52, "num_attention_heads": 32,
         "num_key_value_heads": 2, "head_dim": 128, "hybrid_override_pattern": _NEMOTRON,
         "mamba_num_heads": 64, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8,
         "conv_kernel": 4},
        _SLIME.format("nemotron-nano-30B-A3B"),
    ),
    Published(
        "Granite-4.0-H-Small",
        {"model_type": "granitemoehybrid", "num_hidden_layers": 40, "hidden_size": 4096,
         "num_attention_heads": 32, "num_key_value_heads": 8, "mamba_n_heads": 128,
         "mamba_d_head": 64, "mamba_n_groups": 1, "mamba_d_state": 128, "mamba_d_conv": 4,
         "layer_types": ["mamba"] * 36 + ["attention"] * 4},  # in another order, which adds nothing
        "its config.json as others quote it; heads and groups are transformers' defaults",
    ),
    Published(
        "Qwen3-Next-80B-A3B",
        {"model_type": "qwen3_next", "num_hidden_layers": 48, "full_attention_interval": 4,
         "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256,
         "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
         "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4},
        _SLIME.format("qwen3-next-80B-A3B") + "; the defaults of transformers' Qwen3NextConfig",
    ),
    Published(
        "Qwen3.5-35B-A3B",
        {"model_type": "qwen3_5_moe",
         "text_config": {
             "model_type": "qwen3_5_moe_text", "num_hidden_layers": 40,
             "full_attention_interval": 4, "num_attention_heads": 16, "num_key_value_heads": 2,
             "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
             "linear_key_head_dim": 128, "linear_value_head_dim": 128,
             "linear_conv_kernel_dim": 4, "mamba_ssm_dtype": "float32"}},
        _SLIME.format("qwen3.5-35B-A3B") + "; the defaults of transformers' "
        "Qwen3_5MoeTextConfig",
    ),
)  # fmt: skip
