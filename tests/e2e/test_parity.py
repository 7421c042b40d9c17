"""Greedy tokens after a hand-off equal MLX's own prefill and decode, in fp32, exactly."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.mlx_alone import greedy
from tests.servers import pair

pytestmark = pytest.mark.server

LENGTHS = (1, 2, 31, 32, 33, 127, 128, 129, 700)
TOKENS = 64


def prompts(vocabulary: int) -> list[list[int]]:
    """One random prompt of each length; ids above the special tokens."""
    source = random.Random(7)
    return [[source.randrange(20, vocabulary) for _ in range(n)] for n in LENGTHS]


@pytest.mark.parametrize("model_fixture", ["tiny_llama_path", "tiny_qwen3_path", "smollm2"])
def test_handed_off_tokens_equal_mlx_alone(
    model_fixture: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model: Path = request.getfixturevalue(model_fixture)
    wanted = prompts(49000)
    expected = greedy(model, wanted, TOKENS)
    with pair(model, tmp_path) as (vllm, receiver):
        before = receiver.metric("mlx_receiver_decoded_tokens_total")
        got = [vllm.tokens(prompt, TOKENS) for prompt in wanted]
        decoded = receiver.metric("mlx_receiver_decoded_tokens_total") - before
    for prompt, tokens, reference in zip(wanted, got, expected, strict=True):
        assert tokens == reference, f"prompt of {len(prompt)} tokens"
    assert decoded == len(wanted) * (TOKENS - 1)
