"""vLLM sends its KV quantised: the receiver's tokens are MLX's from a cache that MLX quantised."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache

from mlx_receiver.wire.quantised import row_bytes
from tests.mlx_alone import _model, greedy
from tests.quantised import there_and_back
from tests.servers import Receiver, Vllm, pair

pytestmark = pytest.mark.server

OUTPUT = 24
PROMPTS = [[20 + (7 * i + 3 * n) % 900 for i in range(length)]
           for n, length in enumerate((5, 64, 129, 300))]  # fmt: skip


@pytest.fixture(scope="module", params=["q8", "q4"])
def served(
    request: pytest.FixtureRequest, tiny_qwen3_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Vllm, Receiver]]:
    codec: str = request.param
    logs = tmp_path_factory.mktemp(codec)
    args, env = ("--max-num-batched-tokens", "256"), {"MAC_DECODE_CODEC": codec}
    with pair(tiny_qwen3_path, logs, args=args, env=env) as (vllm, receiver):
        yield codec, vllm, receiver


def by_mlx_alone(path: Path, prompt: list[int], codec: str) -> list[int]:
    """MLX prefills, quantises its cache, and decodes from that."""
    model = _model(path, mx.float32)
    caches = [KVCache() for _ in model.layers]
    tokens = [int(mx.argmax(model(mx.array([prompt]), cache=caches)[0, -1]).item())]
    for cache in caches:
        pair = [array[0, :, : len(prompt)] for array in (cache.keys, cache.values)]
        cache.keys, cache.values = (there_and_back(array, codec)[None] for array in pair)
    while len(tokens) < OUTPUT:
        logits = model(mx.array([tokens[-1:]]), cache=caches)
        tokens.append(int(mx.argmax(logits[0, -1]).item()))
    return tokens


def test_tokens_are_those_of_mlx_with_the_same_cache(
    served: tuple[str, Vllm, Receiver], tiny_qwen3_path: Path
) -> None:
    codec, vllm, receiver = served
    expected = [by_mlx_alone(tiny_qwen3_path, prompt, codec) for prompt in PROMPTS]
    assert expected != greedy(tiny_qwen3_path, PROMPTS, OUTPUT), "it makes no difference"
    receiver.assert_idle()
    decoded = receiver.metric("mlx_receiver_decoded_tokens_total")
    arrived = receiver.metric("mlx_receiver_kv_bytes_total")
    # Alone, then in one batch.
    assert [vllm.tokens(prompt, OUTPUT) for prompt in PROMPTS] == expected
    sent = receiver.metric("mlx_receiver_kv_bytes_total") - arrived
    # 3 layers' K and V, 2 heads of 64 numbers.
    assert sent == sum(map(len, PROMPTS)) * 3 * 2 * 2 * row_bytes(codec, "float32", 64)
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        assert list(pool.map(lambda prompt: vllm.tokens(prompt, OUTPUT), PROMPTS)) == expected
    receiver.assert_idle()
    count = receiver.metric("mlx_receiver_decoded_tokens_total") - decoded
    assert count == 2 * len(PROMPTS) * (OUTPUT - 1), vllm.server.tail()
