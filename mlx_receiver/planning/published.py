"""Published models: what of their ``config.json`` decides the cache's size and, where a source was
found for that, how much there is to compute; and where it stands.

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
         "num_key_value_heads": 8, "head_dim": 128, "hidden_size": 4096,
         "intermediate_size": 14336, "vocab_size": 128256},
        _SLIME.format("llama3.1-8B"),
    ),
    Published(
        "Qwen3-Coder-30B-A3B",
        {"model_type": "qwen3_moe", "num_hidden_layers": 48, "num_attention_heads": 32,
         "num_key_value_heads": 4, "head_dim": 128, "hidden_size": 2048,
         "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
         "vocab_size": 151936},
        "the config.json of RTP-LLM's Qwen3-Coder-30B-A3B-Instruct-RTPurbo; "
        + _SLIME.format("qwen3-30B-A3B"),
    ),
    Published(
        "Qwen3-235B-A22B",
        {"model_type": "qwen3_moe", "num_hidden_layers": 94, "num_attention_heads": 64,
         "num_key_value_heads": 4, "head_dim": 128, "hidden_size": 4096,
         "moe_intermediate_size": 1536, "num_experts": 128, "num_experts_per_tok": 8,
         "vocab_size": 151936},
        _SLIME.format("qwen3-235B-A22B"),
    ),
    Published(
        "GLM-4.5-Air",
        {"model_type": "glm4_moe", "num_hidden_layers": 46, "num_attention_heads": 96,
         "num_key_value_heads": 8, "head_dim": 128, "hidden_size": 4096,
         "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 128,
         "num_experts_per_tok": 8, "n_shared_experts": 1, "first_k_dense_replace": 1,
         "vocab_size": 151552},
        _SLIME.format("glm4.5-106B-A12B") + "; the defaults of transformers' Glm4MoeConfig",
    ),
    Published(
        "MiniMax-M2",
        {"model_type": "minimax_m2", "num_hidden_layers": 62, "num_attention_heads": 48,
         "num_key_value_heads": 8, "head_dim": 128, "hidden_size": 3072,
         "intermediate_size": 1536, "num_local_experts": 256, "num_experts_per_tok": 8,
         "vocab_size": 200064},
        "the defaults of transformers' MiniMaxM2Config and of that in ModelCloud/GPTQModel",
    ),
    Published(
        "Ministral-3-8B",
        {"model_type": "ministral3", "num_hidden_layers": 34, "num_attention_heads": 32,
         "num_key_value_heads": 8, "head_dim": 128, "hidden_size": 4096,
         "intermediate_size": 14336, "vocab_size": 131072},
        "the defaults of transformers' Ministral3Config",
    ),
    Published(
        "Mistral-Small-24B",
        {"model_type": "mistral", "num_hidden_layers": 40, "num_attention_heads": 32,
         "num_key_value_heads": 8, "head_dim": 128, "hidden_size": 5120,
         "intermediate_size": 32768, "vocab_size": 131072},
        "the config.json of unsloth's Mistral-Small-24B-Instruct-2501-GGUF",
    ),
    Published(
        "gpt-oss-20b",
        {"model_type": "gpt_oss", "num_hidden_layers": 24, "num_attention_heads": 64,
         "num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128,
         "layer_types": ["sliding_attention", "full_attention"] * 12, "hidden_size": 2880,
         "intermediate_size": 2880, "num_local_experts": 32, "num_experts_per_tok": 4,
         "vocab_size": 201088, "quantization_config": {"quant_method": "mxfp4"}},
        "docs/gpt-oss-20b-architecture.md of EchoCog/gpt-oss-20b",
    ),
    Published(
        "gpt-oss-120b",
        {"model_type": "gpt_oss", "num_hidden_layers": 36, "num_attention_heads": 64,
         "num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128,
         "layer_types": ["sliding_attention", "full_attention"] * 18, "hidden_size": 2880,
         "intermediate_size": 2880, "num_local_experts": 128, "num_experts_per_tok": 4,
         "vocab_size": 201088, "quantization_config": {"quant_method": "mxfp4"}},
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
        "Llama-4-Scout",
        {"model_type": "llama4",
         "text_config": {
             "model_type": "llama4_text", "num_hidden_layers": 48, "num_attention_heads": 40,
             "num_key_value_heads": 8, "head_dim": 128, "attention_chunk_size": 8192,
             "layer_types": [
                 "chunked_attention" if (i + 1) % 4 else "full_attention" for i in range(48)
             ]}},
        "the defaults of transformers' Llama4TextConfig",
    ),
    Published(
        "DeepSeek-V3",
        {"model_type": "deepseek_v3", "num_hidden_layers": 61, "num_attention_heads": 128,
         "kv_lora_rank": 512, "qk_rope_head_dim": 64},
        _SLIME.format("deepseek-v3") + "; the defaults of transformers' DeepseekV3Config",
    ),
    Published(
        "GLM-4.7-Flash",
        {"model_type": "glm4_moe_lite", "num_hidden_layers": 47, "num_attention_heads": 20,
         "kv_lora_rank": 512, "q_lora_rank": 768, "qk_rope_head_dim": 64, "qk_nope_head_dim": 192,
         "v_head_dim": 256, "hidden_size": 2048, "intermediate_size": 10240,
         "moe_intermediate_size": 1536, "n_routed_experts": 64, "num_experts_per_tok": 4,
         "n_shared_experts": 1, "first_k_dense_replace": 1, "vocab_size": 154880},
        "the defaults of transformers' Glm4MoeLiteConfig; docs/en/examples/glm4.7-30B-A3B.md of "
        "THUDM/slime",
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
         "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "hidden_size": 2048,
         "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "num_experts": 512,
         "num_experts_per_tok": 10, "attn_output_gate": True, "vocab_size": 151936},
        _SLIME.format("qwen3-next-80B-A3B") + "; the defaults of transformers' Qwen3NextConfig",
    ),
    Published(
        "Qwen3.5-27B",
        {"model_type": "qwen3_5",
         "text_config": {
             "model_type": "qwen3_5_text", "num_hidden_layers": 64,
             "full_attention_interval": 4, "num_attention_heads": 24, "num_key_value_heads": 4,
             "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 48,
             "linear_key_head_dim": 128, "linear_value_head_dim": 128,
             "linear_conv_kernel_dim": 4, "mamba_ssm_dtype": "float32", "hidden_size": 5120,
             "intermediate_size": 17408, "attn_output_gate": True, "vocab_size": 248320}},
        _SLIME.format("qwen3.5-27B") + "; the defaults of Modular MAX's Qwen3_5Config",
    ),
    Published(
        "Qwen3.5-35B-A3B",
        {"model_type": "qwen3_5_moe",
         "text_config": {
             "model_type": "qwen3_5_moe_text", "num_hidden_layers": 40,
             "full_attention_interval": 4, "num_attention_heads": 16, "num_key_value_heads": 2,
             "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
             "linear_key_head_dim": 128, "linear_value_head_dim": 128,
             "linear_conv_kernel_dim": 4, "mamba_ssm_dtype": "float32", "hidden_size": 2048,
             "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
             "num_experts": 256, "num_experts_per_tok": 8, "attn_output_gate": True,
             "vocab_size": 248320}},
        _SLIME.format("qwen3.5-35B-A3B") + "; the defaults of transformers' "
        "Qwen3_5MoeTextConfig",
    ),
    Published(
        "Qwen3.5-122B-A10B",
        {"model_type": "qwen3_5_moe",
         "text_config": {
             "model_type": "qwen3_5_moe_text", "num_hidden_layers": 48,
             "full_attention_interval": 4, "num_attention_heads": 32, "num_key_value_heads": 2,
             "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 64,
             "linear_key_head_dim": 128, "linear_value_head_dim": 128,
             "linear_conv_kernel_dim": 4, "mamba_ssm_dtype": "float32", "hidden_size": 3072,
             "moe_intermediate_size": 1024, "shared_expert_intermediate_size": 1024,
             "num_experts": 256, "num_experts_per_tok": 8, "attn_output_gate": True,
             "vocab_size": 248320}},
        "what a server for it expects of its config.json; its model card's layers and experts",
    ),
)  # fmt: skip
