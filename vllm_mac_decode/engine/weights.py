"""What vLLM has loaded, for a receiver that compares it with its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import try_to_load_from_cache

from mlx_receiver.wire import fingerprint as prints

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def precision(config: VllmConfig) -> str:
    """What the weights are kept in: a dtype's name, or how they are quantised."""
    model = config.model_config
    return str(model.quantization or str(model.dtype).removeprefix("torch."))


def fingerprint(config: VllmConfig) -> str:
    """Of the weights (``wire.fingerprint.of_folder``); "" where they are not files that are known,
    or not read as they are."""
    model = config.model_config
    if str(config.load_config.load_format) == "dummy" or model.hf_overrides:
        return ""
    folder = Path(model.model)
    if not folder.is_dir():
        try:
            file = try_to_load_from_cache(model.model, "config.json", revision=model.revision)
        except ValueError:  # a file, or of another kind of storage
            return ""
        if not isinstance(file, str):
            return ""
        folder = Path(file).parent
    return prints.of_folder(folder)
