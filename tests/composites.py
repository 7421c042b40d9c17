"""Models that also see or hear, as they are published: the language part inside of them.

Theirs are other classes in vLLM than those for text alone, with other names of layers. Where no
image may come (``TEXT_ALONE``) vLLM makes no towers, so that there are no weights for them here.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Final

from tests.models import TOKENIZER_FILES

#: transformers' class around that of the language part, and what its configuration must say.
OUTER: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "gemma3": ("Gemma3", {}),
    "gemma3n": ("Gemma3n", {}),
    "gemma4": ("Gemma4", {"vision_config": {}}),
    "llama4": ("Llama4", {}),
    "ministral3": ("Mistral3", {}),
    "qwen2": ("Qwen2_5_VL", {}),
    "qwen3": ("Qwen3VL", {}),
    "qwen3_5": ("Qwen3_5", {}),
    "qwen3_5_moe": ("Qwen3_5Moe", {}),
}

#: What vLLM loads like this, too. Of Gemma 3n vLLM 0.32 does not where no image may come.
WHOLE: Final = ("qwen3_5", "qwen3_5_moe")

#: Options of vLLM's.
TEXT_ALONE: Final = {"limit_mm_per_prompt": {"image": 0, "video": 0, "audio": 0}}


def folder(path: Path) -> Path:
    """Where it is, of the folder that ``tests.families.write`` wrote."""
    return path / "published"


def write(family: str, path: Path) -> None:
    """Make it of the language part in ``path``."""
    import transformers
    from safetensors.torch import load_file, save_file

    config = json.loads((path / "config.json").read_text())
    weights = load_file(path / "model.safetensors")
    if family == "gemma3n":
        _add_unused_projections(weights, config)
    elif family == "qwen3_5_moe":
        _fuse_experts(weights, config)
    if family == "qwen3":  # the same, but for positions of images
        config["model_type"] = "qwen3_vl_text"
    if family in (*WHOLE, "gemma3n", "qwen3"):
        names = {name: name.replace("model.", "model.language_model.", 1) for name in weights}
    elif family == "qwen2":
        names = {name: name for name in weights}
    else:
        names = {name: f"language_model.{name}" for name in weights}
    if family == "llama4":
        config.setdefault("rope_scaling", None)
    place = folder(path)
    place.mkdir()
    renamed = {names[name]: value for name, value in weights.items()}
    save_file(renamed, place / "model.safetensors", metadata={"format": "pt"})
    name, others = OUTER[family]
    outer = getattr(transformers, f"{name}Config")(text_config=dict(config), **others).to_dict()
    outer |= {"architectures": [f"{name}ForConditionalGeneration"], "dtype": config["dtype"],
              "text_config": config, "tie_word_embeddings": config["tie_word_embeddings"],
              "vocab_size": config["vocab_size"]}  # fmt: skip
    if family == "qwen2":  # the hub's are of one part, and call the rotation otherwise
        sections = config.pop("rope_parameters").get("mrope_section")
        own = {"model_type": outer["model_type"], "architectures": outer["architectures"],
               "rope_scaling": {"type": "mrope", "mrope_section": sections}}  # fmt: skip
        outer = {"vision_config": outer["vision_config"]} | config | own
    (place / "config.json").write_text(json.dumps(outer, indent=2) + "\n")
    for file in TOKENIZER_FILES:
        shutil.copyfile(path / file, place / file)


def _add_unused_projections(weights: dict[str, Any], config: dict[str, Any]) -> None:
    """Gemma 3n's layers that read another's K and V have some, too."""
    count = config["num_hidden_layers"]
    for layer in range(count - config["num_kv_shared_layers"], count):
        for name in ("k_norm", "k_proj", "v_proj"):
            unused = weights[f"model.layers.0.self_attn.{name}.weight"].clone()
            weights[f"model.layers.{layer}.self_attn.{name}.weight"] = unused


def _fuse_experts(weights: dict[str, Any], config: dict[str, Any]) -> None:
    """Each layer's experts as one array, ``[experts, out, in]``, gate before up."""
    import torch

    for layer in range(config["num_hidden_layers"]):
        place = f"model.layers.{layer}.mlp.experts"
        places = [f"{place}.{number}" for number in range(config["num_experts"])]
        gate, up, down = (
            torch.stack([weights.pop(f"{one}.{part}_proj.weight") for one in places])
            for part in ("gate", "up", "down")
        )
        weights[f"{place}.gate_up_proj"] = torch.cat((gate, up), dim=1)
        weights[f"{place}.down_proj"] = down
