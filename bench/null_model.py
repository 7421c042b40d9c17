"""``mlx-receiver`` with a Llama that computes nothing, on the CPU.

On a machine with one GPU it stands for a receiver elsewhere: two processes that compute on one GPU
take turns, and vLLM's prefill would take a quarter longer. Its network side is the real one, but
all layers land in one layer's memory, since MLX's CUDA build hands the CPU managed memory, which
is slow to touch first, and its decode step is free.

    python -m bench.null_model start --model FOLDER
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.models.base import BaseModelArgs

from mlx_receiver.caches import model as caches
from mlx_receiver.caches.model import CacheBuffers
from mlx_receiver.cli import main


@dataclass
class ModelArgs(BaseModelArgs):
    """What of ``config.json`` shapes the cache."""

    model_type: str
    num_hidden_layers: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int


class Model(nn.Module):  # type: ignore[misc]
    """Token 0 with certainty; the cache grows as a Llama's does."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.layers: list[nn.Module] = [nn.Module() for _ in range(args.num_hidden_layers)]

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """It has none."""
        return {}

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        """Logits ``[batch, tokens, vocabulary]`` for token ids ``[batch, tokens]``."""
        batch, count = tokens.shape
        new = mx.zeros(
            (batch, self.args.num_key_value_heads, count, self.args.head_dim), mx.bfloat16
        )
        for layer in cache:
            layer.update_and_fetch(new, new)
        return mx.zeros((batch, count, self.args.vocab_size), mx.bfloat16)


class OneLayer(CacheBuffers):
    """Memory of one layer, in every layer's place."""

    def grow(self) -> bool:
        """See ``CacheBuffers.grow``."""
        if not self._made or self.layers == len(self._layout.layers):
            return super().grow()
        again: Any = copy.copy(self._made[0])
        again._arrays = list(again._arrays)
        self._made.append(again)
        return True


if __name__ == "__main__":
    caches.CacheBuffers = OneLayer  # type: ignore[misc]
    mx.set_default_device(mx.cpu)
    llama = ModuleType("mlx_lm.models.llama")
    llama.Model, llama.ModelArgs = Model, ModelArgs  # type: ignore[attr-defined]
    sys.modules[llama.__name__] = llama
    main()
