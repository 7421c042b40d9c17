"""Layers whose attention has a window: only its tokens are there, and decode as MLX's own."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import olmo3
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

from mlx_receiver.caches.model import ModelCache, UnknownCache
from mlx_receiver.sessions.coverage import Coverage
from mlx_receiver.wire import frames
from mlx_receiver.wire.frames import Header, Kind
from mlx_receiver.wire.layout import (
    FULL,
    WINDOW,
    CacheLayout,
    Part,
    full_attention,
    layout_from_config,
    windowed,
)

SIZE, LAYERS, VOCABULARY = 32, 4, 96


@pytest.fixture(scope="module")
def model() -> Any:
    mx.random.seed(7)
    arguments = olmo3.ModelArgs(
        model_type="olmo3",
        hidden_size=64,
        num_hidden_layers=LAYERS,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        sliding_window=SIZE,
        rope_theta=10_000.0,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    made = olmo3.Model(arguments)
    mx.eval(made.parameters())
    return made


def prefilled(model: Any, tokens: int) -> tuple[list[Any], mx.array]:
    """MLX's own caches of a prompt, and the logits of what follows it."""
    caches = make_prompt_cache(model)
    prompt = mx.array([[(5 * i + i * i) % VOCABULARY for i in range(tokens)]])
    logits = model(prompt, cache=caches)[:, -1]
    mx.eval(logits)
    return caches, logits


def of(model: Any) -> ModelCache:
    caches, _ = prefilled(model, 1)
    return ModelCache.of(caches)


def test_the_layout_says_which_tokens_there_are(model: Any) -> None:
    layout = of(model).layout
    assert [layer.kind for layer in layout.layers] == [WINDOW, FULL, WINDOW, FULL]
    keys = layout.layers[0].parts[0]
    assert (keys.window, keys.tokens(10), keys.first(10)) == (SIZE, 10, 0)
    assert (keys.tokens(100), keys.first(100)) == (SIZE, 100 - SIZE)
    per_layer = 2 * 2 * 16 * 4
    assert layout.nbytes(100) == 2 * per_layer * (100 + SIZE)
    config = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
              "head_dim": 16, "sliding_window": SIZE,
              "layer_types": ["sliding_attention", "full_attention"] * 2}  # fmt: skip
    assert layout_from_config(config, "float32") == layout


@pytest.mark.parametrize("tokens", [1, 2, SIZE - 1, SIZE, SIZE + 1, 77, 300])
def test_what_is_built_decodes_as_mlx_alone(model: Any, tokens: int) -> None:
    native, logits = prefilled(model, tokens)
    cache = of(model)
    buffers = cache.allocate(cache.layout, tokens, 512)
    while buffers.grow():
        pass
    for layer, own in enumerate(native):
        for index, array in enumerate((own.keys, own.values)):
            if isinstance(own, RotatingKVCache):
                array = own._temporal_order(array)[..., -min(tokens, SIZE) :, :]
            else:
                array = array[..., :tokens, :]
            part = buffers.part(layer, index)
            part[:, : array.shape[2]] = np.array(array)[0].view(np.uint32)
            del part
    built = buffers.build()
    mine, theirs = logits, logits
    for _ in range(3 * SIZE):
        token = mx.argmax(theirs, axis=-1)[None]
        theirs = model(token, cache=native)[:, -1]
        mine = model(token, cache=built)[:, -1]
        assert mx.array_equal(mine, theirs).item()


def test_memory_is_the_windows(model: Any) -> None:
    cache = of(model)
    per_token = 2 * 2 * 16 * 4
    assert cache.nbytes(4096, 0, 4) == 2 * per_token * (4096 + SIZE)
    assert cache.nbytes(4, 0, 4) == 2 * per_token * (256 + SIZE)


def header(start: int, tokens: int) -> Header:
    return Header(Kind.BLOCK, 1, tokens * 2 * 16 * 4, 0, 0, "float32", 0, 2, 16, start, tokens)


def test_tokens_before_the_window_are_not_taken() -> None:
    plain = full_attention(1, 2, 16, "float32")
    coverage = Coverage(CacheLayout([windowed(plain.layers[0], SIZE)]), 100)
    assert coverage.absent == 2 * 2 * SIZE
    assert coverage.wrong(header(67, 10)) == "the layer's window begins at token 68"
    assert coverage.wrong(header(95, 6)) == "the prompt has 100 tokens"
    assert not coverage.wrong(header(68, SIZE))
    coverage.arrived(coverage.at(header(70, 30)))
    assert coverage.missing().startswith("layer 0, keys, head 0, tokens 68..69 (")
    coverage.arrived(coverage.at(header(68, 2)))
    assert coverage.missing().startswith("layer 0, values, head 0, tokens 68..99 (")


def test_the_headers_of_a_whole_cache_are_those_of_the_window() -> None:
    plain = full_attention(2, 2, 16, "float32")
    layout = CacheLayout([plain.layers[0], windowed(plain.layers[1], SIZE)])
    found = [(h.layer, h.token_start, h.tokens) for h in frames.blocks(1, 100, layout, 1 << 20)]
    assert found == [(0, 0, 100), (0, 0, 100), (1, 68, SIZE), (1, 68, SIZE)]
    coverage = Coverage(layout, 100)
    for each in frames.blocks(1, 100, layout, 5 * 2 * 16 * 4):
        assert not coverage.wrong(each)
        coverage.arrived(coverage.at(each))
    assert not coverage.absent


def test_a_window_that_mlx_does_not_know_ends_the_context() -> None:
    """Mistral's, say: what both engines compute is the same until it is full."""
    mine = full_attention(2, 2, 16, "float32")
    theirs = CacheLayout([windowed(layer, SIZE) for layer in mine.layers])
    assert mine.differences(theirs) == [] and mine.limit(theirs) == SIZE
    assert mine.limit(mine) is None
    # The other way round they differ from the first token that leaves the window.
    assert theirs.differences(mine) == ["layers 0..1, kind: window here, full there"]
    other = CacheLayout([windowed(layer, SIZE + 1) for layer in mine.layers])
    assert theirs.differences(other) == [
        f"layers 0..1, {name}: window: {SIZE} here, {SIZE + 1} there" for name in ("keys", "values")
    ]


def test_a_cache_that_keeps_the_first_tokens_is_another_kind() -> None:
    cache = RotatingKVCache(SIZE, keep=4)
    cache.update_and_fetch(mx.zeros((1, 2, 1, 16)), mx.zeros((1, 2, 1, 16)))
    with pytest.raises(UnknownCache, match="layer 0 has a RotatingKVCache"):
        ModelCache.of([cache])


def test_a_part_without_tokens_has_no_window() -> None:
    state = Part("state", 3, 5, "float32", by_token=False)
    assert (state.tokens(100), state.first(100)) == (1, 0)
    channels = Part("state", 3, 1, "float32", by_token=False, rows=10)
    assert (channels.tokens(100), channels.first(100)) == (10, 0)
