"""A receiver with a tiny model, and prompts that MLX has prefilled for it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from mlx_receiver.decode.model import find_model, load_model
from mlx_receiver.receiver import Receiver
from tests.mlx_receiver.client import FakeVllm, Prefilled, connected, started

Prefill = Callable[..., Prefilled]


@pytest.fixture(scope="session")
def prefill(tiny_llama_path: Path) -> Prefill:
    """``prefill(tokens, decode=8, seed=0)``: MLX's own cache and greedy text of a prompt of so many
    tokens, or of those given."""
    import mlx.core as mx

    source = find_model(str(tiny_llama_path))
    loaded = load_model(source)
    model = loaded.model

    @functools.cache
    def run(wanted: int | tuple[int, ...], decode: int = 8, seed: int = 0) -> Prefilled:
        if isinstance(wanted, int):
            rng = np.random.default_rng((wanted, seed))
            prompt = rng.integers(20, source.signature.vocab_size, wanted).tolist()
        else:
            prompt = list(wanted)
        tokens = len(prompt)
        cache = loaded.cache.empty()
        if tokens > 1:
            # Only the cache is evaluated: logits of every position would take most of the time.
            model(mx.array([prompt[:-1]]), cache=cache)
            mx.eval([c.keys for c in cache], [c.values for c in cache])
        logits = model(mx.array([prompt[-1:]]), cache=cache)
        planes = [
            [np.array(plane[0, :, :tokens]).view(np.uint32) for plane in (c.keys, c.values)]
            for c in cache
        ]
        text = [int(mx.argmax(logits[0, -1]).item())]
        while len(text) < decode:
            logits = model(mx.array([[text[-1]]]), cache=cache)
            text.append(int(mx.argmax(logits[0, -1]).item()))
        return Prefilled(prompt, planes, "float32", text)

    return run


@pytest.fixture(scope="session")
def receiver(tiny_llama_path: Path) -> Iterator[Receiver]:
    """A receiver on free ports, shared by the tests that leave it as they found it."""
    with started(tiny_llama_path, http_port=0, kv_memory=1 << 30) as receiver:
        yield receiver


@pytest.fixture
def client(receiver: Receiver) -> Iterator[FakeVllm]:
    """A welcomed client of the shared receiver."""
    with connected(receiver) as started:
        yield started
