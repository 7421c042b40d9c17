"""Greedy tokens after a hand-off equal MLX's own prefill and decode, in fp32, exactly."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.mlx_alone import greedy
from tests.servers import Receiver, Vllm, pair

pytestmark = pytest.mark.server

LENGTHS = (1, 2, 31, 32, 33, 127, 128, 129, 700)
TOKENS = 64


def prompts() -> list[list[int]]:
    """One random prompt of each length; ids above the special tokens."""
    source = random.Random(7)
    return [[source.randrange(20, 49000) for _ in range(n)] for n in LENGTHS]


def check(vllm: Vllm, receiver: Receiver, expected: list[list[int]]) -> None:
    """Hand every prompt off and compare."""
    before = receiver.metric("mlx_receiver_decoded_tokens_total")
    for prompt, reference in zip(prompts(), expected, strict=True):
        assert vllm.tokens(prompt, TOKENS) == reference, f"prompt of {len(prompt)} tokens"
    decoded = receiver.metric("mlx_receiver_decoded_tokens_total") - before
    assert decoded == len(LENGTHS) * (TOKENS - 1)


def test_tiny_llama(vllm: Vllm, receiver: Receiver, tiny_llama_path: Path) -> None:
    check(vllm, receiver, greedy(tiny_llama_path, prompts(), TOKENS))


def test_tiny_qwen3_with_qk_norm(tiny_qwen3_path: Path, tmp_path: Path) -> None:
    expected = greedy(tiny_qwen3_path, prompts(), TOKENS)
    with pair(tiny_qwen3_path, tmp_path) as (vllm, receiver):
        check(vllm, receiver, expected)


@pytest.mark.real_model
@pytest.mark.timeout(1500)
def test_smollm2(smollm2: Path, tmp_path: Path) -> None:
    expected = greedy(smollm2, prompts(), TOKENS)
    with pair(smollm2, tmp_path) as (vllm, receiver):
        check(vllm, receiver, expected)
