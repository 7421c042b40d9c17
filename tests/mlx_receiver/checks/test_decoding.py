"""MLX decodes rightly here, and what is said when it does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_receiver.caches.plain import PlainKV
from mlx_receiver.checks import decoding
from mlx_receiver.decode.engine import DecodeEngine
from mlx_receiver.decode.model import find_model, load_model


def test_a_mac_without_metal_is_wrong_and_another_machine_is_not_checked() -> None:
    assert decoding.check_device("darwin").state == "wrong"
    found = decoding.check_device("linux")
    assert (found.state, "not checked: no Metal here" in found.seen) == ("unchecked", True)


def test_memory_of_one_thread_is_decoded_from_in_another() -> None:
    assert decoding.check_threads().state == "fine"


class Spoiling(PlainKV):
    """An adapter whose caches are not what was received."""

    def __init__(self, spoil: Callable[[Any], Any]) -> None:
        self._spoil = spoil
        self._layers = 0

    def allocate(self, *arguments: Any) -> Any:
        buffers = super().allocate(*arguments)
        build, spoil = buffers.build, self._spoil
        self._layers += 1
        if self._layers != 2:
            return buffers

        def spoiled(dtype: Any) -> Any:
            cache, arrays = build(dtype)
            cache.keys = spoil(cache.keys)
            return cache, [cache.keys, *arrays]

        buffers.build = spoiled  # type: ignore[method-assign]
        return buffers


def test_bytes_that_differ_are_noticed() -> None:
    found = decoding.check_threads(Spoiling(lambda keys: keys.at[0, 1, 7, 3].add(1)))
    assert (found.state, found.seen[:21]) == ("wrong", "1 of 307200 values di")


def test_a_hidden_copy_is_noticed() -> None:
    kept = []

    def copy(keys: Any) -> Any:
        kept.append(keys)  # else MLX writes the product where the factor was
        return keys * 1

    found = decoding.check_threads(Spoiling(copy))
    assert (found.state, "copies 1 of 4 arrays" in found.seen) == ("warning", True)


def test_an_alias_that_outlives_the_handoff_is_noticed() -> None:
    """Then MLX copies at the first decode step."""
    import mlx.core as mx

    kept = []

    def keep(keys: Any) -> Any:
        kept.append(np.array(keys.view(mx.uint16), copy=False))
        return keys

    found = decoding.check_threads(Spoiling(keep))
    assert (found.state, "when the cache is decoded from" in found.seen) == ("warning", True)


def test_a_thread_that_fails_is_noticed() -> None:
    found = decoding.check_threads(Spoiling(lambda keys: 1 / 0))
    assert (found.state, "division by zero" in found.seen) == ("wrong", True)


def test_tokens_of_both_processors() -> None:
    logits = np.random.default_rng(0).standard_normal((5, 50)).astype(np.float32)
    tokens = logits.argmax(-1).tolist()
    assert decoding.compare("tokens", tokens, logits).state == "fine"
    # A tie within rounding.
    near = logits.copy()
    other = (tokens[2] + 1) % 50
    near[2, other] = near[2, tokens[2]] + 1e-3
    found = decoding.compare("tokens", tokens, near)
    assert (found.state, "4 of 5" in found.seen, "within rounding" in found.seen) == (
        "fine", True, True,
    )  # fmt: skip
    near[2, other] += 2
    found = decoding.compare("tokens", tokens, near)
    assert (found.state, "at token 2" in found.seen) == ("wrong", True)
    near[4, 0] = np.nan
    assert decoding.compare("tokens", tokens, near).state == "wrong"


@pytest.fixture
def model(tiny_llama_path: Path) -> Any:
    return load_model(find_model(str(tiny_llama_path))).model


def test_the_reference_follows_the_text_that_the_gpu_wrote(model: Any) -> None:
    """One other token early on must not make all that follow it different."""
    import mlx.core as mx

    prompt = [30, 40, 50]
    tokens, logits = decoding.greedy(model, prompt, 6, mx.cpu)
    assert len(set(tokens)) > 2
    again, same = decoding.greedy(model, prompt, 6, mx.cpu, forced=tokens)
    assert again == tokens and np.array_equal(logits, same)
    forced = [tokens[0] + 1, *tokens[1:]]
    _, other = decoding.greedy(model, prompt, 6, mx.cpu, forced=forced)
    assert np.array_equal(other[0], logits[0]) and not np.allclose(other[1], logits[1])
    assert decoding.compare("t", forced, other).state == "wrong"


def test_logits_that_are_not_finite_are_noticed(model: Any) -> None:
    assert decoding.check_tokens("tokens", model, [30, 40], 2).state == "unchecked"
    model.lm_head.weight[5] = float("nan")
    found = decoding.check_tokens("tokens", model, [30, 40], 2)
    assert (found.state, found.seen) == ("wrong", "logits that are not finite")


def test_recovery(tiny_llama_path: Path) -> None:
    import mlx.core as mx

    source = find_model(str(tiny_llama_path))
    found = decoding.check_recovery(source, decoding.provoke_error)
    assert found.state == "fine" and "a cache of another shape" in found.seen
    assert decoding.check_recovery(source, lambda engine: "").state == "wrong"

    def other_tokens(engine: DecodeEngine) -> str:
        assert engine.loaded is not None
        head = engine.loaded.model.lm_head
        head.weight = -head.weight
        mx.eval(head.weight)
        return "something"

    found = decoding.check_recovery(source, other_tokens)
    assert (found.state, "other tokens" in found.seen) == ("wrong", True)

    def end(engine: DecodeEngine) -> str:
        engine.stop()
        return "something"

    found = decoding.check_recovery(source, end)
    assert (found.state, "nothing is decoded" in found.seen) == ("wrong", True)
