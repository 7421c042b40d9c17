"""The parity reference: mlx-lm's own model and cache, nothing of ours."""

from __future__ import annotations

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm import load
from mlx_lm.models.cache import make_prompt_cache


def greedy(
    path: str, prompts: list[list[int]], max_tokens: int, dtype: mx.Dtype = mx.float32
) -> list[list[int]]:
    """Greedy tokens for each prompt (any end-of-text token included), in ``dtype``."""
    model, _ = load(path)
    model.update(tree_map(lambda p: p.astype(dtype), model.parameters()))
    results = []
    for prompt in prompts:
        cache = make_prompt_cache(model)
        tokens = []
        logits = model(mx.array([prompt]), cache=cache)
        for _ in range(max_tokens):
            token = int(mx.argmax(logits[0, -1]).item())
            tokens.append(token)
            logits = model(mx.array([[token]]), cache=cache)
        results.append(tokens)
    return results
