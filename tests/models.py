"""Small random models in Hugging Face format that vLLM and mlx-lm both load.

Their weights are scaled so that greedy text wanders instead of repeating a token, depends on the
whole prompt, and has top-1 margins that fp32 rounding does not flip. Special tokens, the end of
text among them, are never the most likely ones: a request yields as many tokens as it asks for.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_mac_decode.tools.demo.model import fetch_smollm2, lift_rope_theta

GENERATOR_VERSION = 2
"""Raise it with every change that changes what is written: caches are keyed by it."""

VOCABULARY = 49_152
SPECIAL_TOKENS = 17
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

SHARED: dict[str, Any] = {
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 64,
    "intermediate_size": 256,
    "max_position_embeddings": 8192,
    "num_key_value_heads": 2,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    "vocab_size": VOCABULARY,
}


def tiny_llama(path: Path, dtype: str = "float32", seed: int = 0, **overrides: Any) -> Path:
    """Write a Llama of 4 layers, 8 heads and 2 KV heads of 32; `overrides` go to its config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"num_hidden_layers": 4, "num_attention_heads": 8, "head_dim": 32}
    model = LlamaForCausalLM(LlamaConfig(**{**SHARED, **shape, **overrides}))
    return _write(model, path, dtype, seed)


def tiny_qwen3(path: Path, dtype: str = "float32", seed: int = 0, **overrides: Any) -> Path:
    """Write a Qwen3 (normalised queries and keys) of 3 layers, 4 heads and 2 KV heads of 64."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = {"num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 64}
    model = Qwen3ForCausalLM(Qwen3Config(**{**SHARED, **shape, **overrides}))
    return _write(model, path, dtype, seed)


def _fuzzed_llama(path: Path) -> Path:
    """Its rows can be quantised."""
    return tiny_llama(path, num_hidden_layers=2, num_attention_heads=4, head_dim=64)


#: Writers of the models that are kept in the user's cache, by their names there.
MODELS: dict[str, Callable[[Path], Path]] = {
    "tiny-llama": tiny_llama,
    "tiny-qwen3": tiny_qwen3,
    "fuzz-llama-64": _fuzzed_llama,
}


def _write(model: Any, path: Path, dtype: str, seed: int) -> Path:
    import torch

    _randomise(model, torch.Generator().manual_seed(seed))
    save(model, path, dtype)
    lift_rope_theta(path)
    assert json.loads((path / "config.json").read_text())["dtype"] == dtype
    return path


def save(model: Any, path: Path, dtype: str) -> None:
    """Write the model in that dtype, with a tokenizer."""
    import torch

    model.config.architectures = [type(model).__name__]
    model.to(getattr(torch, dtype)).save_pretrained(path)
    tokenizer = fetch_smollm2()
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, path / name)


def _randomise(model: Any, generator: Any) -> None:
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.uniform_(0.7, 1.3, generator=generator)
                if "q_norm" in name or "k_norm" in name:
                    weight.mul_(1.4)
            elif "embed_tokens" in name:
                weight.normal_(0.0, 1.0, generator=generator)
            else:
                # Unit variance in gives `gain` squared out: a logit spread of 3, and attention
                # that is neither uniform nor on one token.
                gain = 3.0 if "lm_head" in name else 1.4
                weight.normal_(0.0, gain / math.sqrt(weight.shape[1]), generator=generator)
        model.lm_head.weight[:SPECIAL_TOKENS] = 0.0
