"""The parity reference: mlx-lm's own model and cache, nothing of ours."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models.cache import KVCache, make_prompt_cache
from mlx_lm.utils import load_model
from numpy.typing import NDArray


@functools.cache
def _model(path: Path, dtype: mx.Dtype) -> Any:
    model, _ = load_model(path)
    model.update(tree_map(lambda p: p.astype(dtype), model.parameters()))
    return model


def greedy(
    path: Path,
    prompts: list[list[int]],
    max_tokens: int,
    dtype: mx.Dtype = mx.float32,
    cache: Callable[[int], Any] | None = None,
) -> list[list[int]]:
    """``max_tokens`` greedy tokens for each prompt, whatever they are, in ``dtype``. ``cache``
    makes a layer's for a prompt of so many tokens."""
    model = _model(path, dtype)
    results = []
    for prompt in prompts:
        layers = make_prompt_cache(model)
        if cache is not None:
            layers = [cache(len(prompt)) for _ in layers]
        tokens: list[int] = []
        if prompt[:-1]:
            model.model(mx.array([prompt[:-1]]), cache=layers)  # no logits for these
            mx.eval([layer.state for layer in layers])
        last = prompt[-1]
        for _ in range(max_tokens):
            logits = model(mx.array([[last]]), cache=layers)
            last = int(mx.argmax(logits[0, -1]).item())
            tokens.append(last)
        results.append(tokens)
    return results


class Float8Prompt(KVCache):  # type: ignore[misc]
    """Of a prompt it keeps what vLLM's ``--kv-cache-dtype fp8_e4m3`` does: on a CPU the kernel cuts
    off what does not fit."""

    def __init__(self, prompt_tokens: int) -> None:
        super().__init__()
        self._prompt_tokens = prompt_tokens

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """As ``KVCache``."""
        if self.offset < self._prompt_tokens:
            keys, values = (mx.array(_cut_off(np.array(array))) for array in (keys, values))
        found: tuple[mx.array, mx.array] = super().update_and_fetch(keys, values)
        return found


def _cut_off(numbers: NDArray[np.float32]) -> NDArray[np.float32]:
    codes = np.arange(127)  # the positive ones, in order
    exponents, fractions = codes >> 3, codes % 8 / 8
    known = np.where(exponents, 1 + fractions, 2 * fractions) * 2.0 ** (exponents - 7.0)
    below = np.searchsorted(known, np.abs(numbers), side="right") - 1
    return (np.sign(numbers) * known[below]).astype(np.float32)
