"""Greedy tokens after a hand-off equal MLX's own prefill and decode, in fp32, exactly."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.mlx_alone import greedy
from tests.servers import Receiver, Vllm, pair

pytestmark = pytest.mark.server

LENGTHS = (1, 2, 31, 32, 33, 127, 128, 129, 700)
TOKENS = 64


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    """One random prompt of each length; ids above the special tokens."""
    source = random.Random(7)
    return [[source.randrange(20, 49000) for _ in range(n)] for n in lengths]


def check(
    vllm: Vllm,
    receiver: Receiver,
    expected: list[list[int]],
    lengths: tuple[int, ...] = LENGTHS,
    at_once: int = 1,
) -> None:
    """Hand every prompt off, ``at_once`` at a time, and compare."""
    before = receiver.metric("mlx_receiver_decoded_tokens_total")
    with ThreadPoolExecutor(at_once) as pool:
        got = list(pool.map(lambda prompt: vllm.tokens(prompt, TOKENS), prompts(lengths)))
    for prompt, tokens, reference in zip(prompts(lengths), got, expected, strict=True):
        assert tokens == reference, f"prompt of {len(prompt)} tokens"
    decoded = receiver.metric("mlx_receiver_decoded_tokens_total") - before
    assert decoded == len(lengths) * (TOKENS - 1)


def test_tiny_llama(vllm: Vllm, receiver: Receiver, tiny_llama_path: Path) -> None:
    check(vllm, receiver, greedy(tiny_llama_path, prompts(), TOKENS))


def test_tiny_qwen3_with_qk_norm(tiny_qwen3_path: Path, tmp_path: Path) -> None:
    expected = greedy(tiny_qwen3_path, prompts(), TOKENS)
    with pair(tiny_qwen3_path, tmp_path) as (vllm, receiver):
        check(vllm, receiver, expected)


@pytest.mark.real_model
@pytest.mark.timeout(1500)  # MLX's own prefill on a CPU is what takes the time
def test_smollm2(smollm2: Path, tmp_path: Path) -> None:
    """A real model, with fewer lengths: MLX takes some 0.2 s a token on a CPU, prompt included."""
    lengths = (1, 33, 129)
    expected = greedy(smollm2, prompts(lengths), TOKENS)
    with pair(smollm2, tmp_path) as (vllm, receiver):
        check(vllm, receiver, expected, lengths)
