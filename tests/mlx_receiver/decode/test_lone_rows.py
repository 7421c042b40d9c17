"""Caches that mlx-lm cannot batch: their responses are decoded one after the other, in turn."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
import pytest
from mlx_lm.models.cache import ChunkedKVCache
from mlx_lm.utils import load_model as mlx_load

from mlx_receiver.caches.chunk import ChunkKV
from mlx_receiver.caches.plain import keys_and_values
from mlx_receiver.decode.batch import Batch
from mlx_receiver.decode.jobs import Job
from mlx_receiver.decode.model import find_model, load_model
from mlx_receiver.wire.layout import (
    CHUNK,
    FULL,
    WINDOW,
    CacheLayout,
    LayerLayout,
    Part,
    chunked,
    windowed,
)
from mlx_receiver.wire.sampling import Sampling
from tests.conftest import cached_family
from tests.families import CHUNK as SIZE
from tests.families import for_mlx
from tests.mlx_receiver.client import started

#: In the first chunk, at its end, behind it, and longer than a step of a prefill.
LENGTHS = (3, SIZE - 1, SIZE, 3 * SIZE + 5, 300)
PROMPTS = [[1 + (7 * i + n) % 500 for i in range(n)] for n in LENGTHS]
OUTPUT = 70


@pytest.fixture(scope="module")
def model() -> Path:
    pytest.importorskip("torch")  # which writes it
    return for_mlx("llama4", cached_family("llama4"))


def by_mlx(folder: Path, prompt: list[int]) -> list[int]:
    """As the model was published: nothing of ours has changed its rotation."""
    model, _ = mlx_load(folder)
    model.set_dtype(mx.float32)
    cache, tokens, new = model.make_cache(), [], prompt
    for _ in range(OUTPUT):
        new = [int(mx.argmax(model(mx.array([new]), cache=cache)[0, -1]).item())]
        tokens += new
    return tokens


def test_several_at_once_are_decoded_as_each_alone(model: Path) -> None:
    expected = [by_mlx(model, prompt) for prompt in PROMPTS]
    with started(model, http_port=0, dtype="float32") as receiver:
        assert receiver.http is not None
        url = f"http://127.0.0.1:{receiver.http.port}"

        def ask(prompt: list[int]) -> list[int]:
            body = {"prompt": prompt, "max_tokens": OUTPUT, "temperature": 0, "ignore_eos": True,
                    "return_token_ids": True}  # fmt: skip
            answer = httpx.post(f"{url}/v1/completions", json=body).json()
            tokens: list[int] = answer["choices"][0]["token_ids"]
            return tokens

        def leave(prompt: list[int]) -> None:
            """A client that goes away while its prompt is read, or its text is written."""
            body = {"prompt": prompt, "max_tokens": 500, "ignore_eos": True, "stream": True}
            with httpx.stream("POST", f"{url}/v1/completions", json=body) as answer:
                next(answer.iter_lines())

        with ThreadPoolExecutor(len(PROMPTS) + 2) as pool:
            left = [pool.submit(leave, prompt) for prompt in PROMPTS[-2:]]
            assert list(pool.map(ask, PROMPTS)) == expected
            for one in left:
                one.result()
        health = httpx.get(f"{url}/health").json()
        assert health["decoding"] == health["waiting"] == 0


def test_what_a_chunk_keeps() -> None:
    part = Part("keys", 2, 4, "float32", chunk=SIZE)
    for tokens, first in ((1, 0), (SIZE, 0), (SIZE + 1, SIZE), (3 * SIZE, 2 * SIZE)):
        assert (part.first(tokens), part.tokens(tokens)) == (first, tokens - first)
    plain = CacheLayout([LayerLayout(FULL, [Part("keys", 2, 4, "float32")])])
    chunks = CacheLayout([chunked(plain.layers[0], SIZE)])
    # One that does not know chunks has the same cache until the first one is full.
    assert plain.differences(chunks) == [] and plain.limit(chunks) == SIZE
    assert chunks.differences(plain) == ["layer 0, kind: chunk here, full there"]
    # A lie about that would let a cache with holes pass for a whole one.
    both = windowed(chunks.layers[0], 1 << 16)
    for kind in (CHUNK, WINDOW):
        (line,) = plain.differences(CacheLayout([LayerLayout(kind, both.parts)]))
        assert line == f"layer 0, keys: window and chunk do not fit the kind {kind}"


def test_prompts_are_read_one_at_a_time(model: Path) -> None:
    """Eight at once would keep running responses waiting for eight chunks."""
    source = find_model(str(model))
    batch = Batch(source, load_model(source, "float32"), rows=16)
    jobs = [
        Job(list(range(1, 400)), Sampling(max_tokens=4, temperature=0.0), _Nobody())
        for _ in range(3)
    ]
    for job in jobs:
        batch.add(batch.prepare(job))
    tokens: list[tuple[Job, int]] = []
    while not tokens:
        before = [len(row.held) for row in batch._lone]
        tokens = batch.step()
        grown = [len(row.held) - n for row, n in zip(batch._lone, before, strict=True)]
        assert sum(n > 1 for n in grown) <= 1
    assert [job for job, _ in tokens] == jobs[:1]
    assert batch.remove(jobs[1:]) == jobs[1:] and batch.jobs == jobs[:1]
    assert batch.restart() == jobs[:1] and not batch.jobs
    batch.close()


class _Nobody:
    """Where no token goes."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was called")


@pytest.mark.parametrize("tokens", [1, SIZE - 1, SIZE, SIZE + 1, 5 * SIZE + 7])
def test_what_was_received_is_what_mlx_would_hold(tokens: int) -> None:
    own = ChunkedKVCache(SIZE)
    mx.random.seed(tokens)
    rows = mx.random.normal((2, 1, 2, tokens, 4))
    own.update_and_fetch(rows[0], rows[1])
    adapter = ChunkKV()
    layer = adapter.layout(own)
    assert layer == chunked(keys_and_values(own), SIZE) and layer.kind == CHUNK
    buffers = adapter.allocate(layer, tokens, 8)
    parts = adapter.parts(layer, own, tokens)
    for index, array in enumerate(parts):
        held = layer.parts[index].tokens(tokens)
        assert array.shape == (2, held, 4)
        buffers.part(index)[:, :held] = memoryview(array.view(mx.uint32))
    built, arrays = buffers.build([mx.float32, mx.float32])
    mx.eval(arrays)
    assert built.offset == own.offset
    for mine, received in zip(parts, adapter.parts(layer, built, tokens), strict=True):
        assert mx.array_equal(mine, received)
    # It goes on as mlx-lm's own does.
    more = mx.ones((1, 2, 1, 4))
    for _ in range(2 * SIZE):
        for cache in (own, built):
            cache.maybe_trim_front()
            keys, _ = cache.update_and_fetch(more, more)
            first = (cache.offset - 1) // SIZE * SIZE - cache.start_position
            seen = keys[:, :, max(0, first) :]
            assert seen.shape[2] <= SIZE
            if cache is own:
                expected = seen
        assert mx.array_equal(seen, expected)
