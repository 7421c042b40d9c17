"""Greedy tokens after a hand-off equal MLX's own prefill and decode, in fp32, exactly."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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


def check(
    vllm: Vllm, receiver: Receiver, expected: Callable[[], list[list[int]]], at_once: int = 1
) -> None:
    """Hand every prompt off and compare."""
    before = receiver.metric("mlx_receiver_decoded_tokens_total")
    with ThreadPoolExecutor(at_once) as pool:
        answers = list(pool.map(lambda prompt: vllm.tokens(prompt, TOKENS), prompts()))
    for length, answer, reference in zip(LENGTHS, answers, expected(), strict=True):
        assert answer == reference, f"prompt of {length} tokens"
    decoded = receiver.metric("mlx_receiver_decoded_tokens_total") - before
    assert decoded == len(LENGTHS) * (TOKENS - 1)


def test_tiny_llama(vllm: Vllm, receiver: Receiver, tiny_llama_path: Path) -> None:
    check(vllm, receiver, lambda: greedy(tiny_llama_path, prompts(), TOKENS))


def test_tiny_qwen3_with_qk_norm(tiny_qwen3_path: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as meanwhile:
        expected = meanwhile.submit(greedy, tiny_qwen3_path, prompts(), TOKENS)
        with pair(tiny_qwen3_path, tmp_path) as (vllm, receiver):
            check(vllm, receiver, expected.result)


@pytest.mark.real_model
@pytest.mark.timeout(1500)
def test_smollm2(smollm2: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as meanwhile:
        expected = meanwhile.submit(greedy, smollm2, prompts(), TOKENS)
        with pair(smollm2, tmp_path) as (vllm, receiver):
            check(vllm, receiver, expected.result, at_once=len(LENGTHS))
