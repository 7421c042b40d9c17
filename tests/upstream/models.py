"""The two models that the tests ask, by the names of the groups in selection.toml."""

from __future__ import annotations

import math
from pathlib import Path

from tests.conftest import cached_model
from tests.models import tiny_llama

_END = 2  # <|im_end|>

#: The spread of the end's logit beside 3 of the other tokens', whose largest is some 12.6: the end
#: comes about once in 50 tokens.
_END_SPREAD = 6.0


def wandering() -> Path:
    """A random Llama whose text never ends by itself, see `tests.models.tiny_llama`."""
    return cached_model("tiny-llama", tiny_llama)


def ending() -> Path:
    """The same with a longer context, whose text ends after some dozens of tokens."""
    return cached_model("tiny-llama-ending", _write_ending)


def _write_ending(path: Path) -> Path:
    import torch
    from safetensors.torch import load_file, save_file

    tiny_llama(path, max_position_embeddings=16_384)
    file = path / "model.safetensors"
    weights = load_file(file)
    head = weights["lm_head.weight"]
    spread = _END_SPREAD / math.sqrt(head.shape[1])
    head[_END].normal_(0.0, spread, generator=torch.Generator().manual_seed(0))
    save_file(weights, file, {"format": "pt"})
    return path
