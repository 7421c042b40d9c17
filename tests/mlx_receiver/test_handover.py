"""A prompt prefilled elsewhere continues exactly as if MLX had prefilled it."""

from __future__ import annotations

import random

import pytest

from mlx_receiver.wire.messages import Sampling
from tests.mlx_receiver.client import FakeVllm
from tests.mlx_receiver.conftest import Prefill

GREEDY = Sampling(max_tokens=8, temperature=0.0)


@pytest.mark.parametrize("tokens", [1, 2, 17, 255, 256, 257, 700])
def test_decoded_tokens_equal_mlx_alone(client: FakeVllm, prefill: Prefill, tokens: int) -> None:
    kv = prefill(tokens)
    session = client.request(kv, GREEDY, random.Random(tokens))
    assert [kv.first, *client.tokens(session)] == kv.tokens
