"""The parity reference: mlx-lm's own model and cache, nothing of ours."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model


@cache
def _model(path: Path, dtype: mx.Dtype) -> Any:
    model, _ = load_model(path)
    model.update(tree_map(lambda p: p.astype(dtype), model.parameters()))
    return model


def greedy(
    path: Path, prompts: list[list[int]], max_tokens: int, dtype: mx.Dtype = mx.float32
) -> list[list[int]]:
    """``max_tokens`` greedy tokens for each prompt, whatever they are, in ``dtype``."""
    model = _model(path, dtype)
    results = []
    for prompt in prompts:
        cache = make_prompt_cache(model)
        tokens: list[int] = []
        if prompt[:-1]:
            model.model(mx.array([prompt[:-1]]), cache=cache)  # no logits for these
            mx.eval([layer.state for layer in cache])
        last = prompt[-1]
        for _ in range(max_tokens):
            logits = model(mx.array([[last]]), cache=cache)
            last = int(mx.argmax(logits[0, -1]).item())
            tokens.append(last)
        results.append(tokens)
    return results
