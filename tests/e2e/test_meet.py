"""On a slow link the receiver computes the front of a prompt while vLLM sends it from the end."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bench.lab import NoRights, Place, shaped_link
from tests.mlx_alone import greedy
from tests.servers import Receiver, Vllm, start_receiver, start_vllm
from tests.waiting import eventually

pytestmark = pytest.mark.server

TOKENS = 24
#: The tiny Llama's K and V of a token, in fp32.
A_TOKEN = 2 * 4 * 2 * 32 * 4
TOKEN = "a-token-of-the-tests"


@pytest.fixture(scope="module")
def link() -> Iterator[tuple[Place, Place]]:
    """Some 1,200 tokens' KV a second, and little that is queued."""
    try:
        with shaped_link(rate="20mbit", burst="32kb", limit="256kb") as places:
            yield places
    except NoRights as error:
        pytest.skip(str(error))


def prompts(lengths: list[int], seed: int) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(20, 49000) for _ in range(length)] for length in lengths]


def test_they_meet(link: tuple[Place, Place], tiny_llama_path: Path, tmp_path: Path) -> None:
    spark, mac = link
    batches = [prompts([1500], 1), prompts([1, 33, 700, 1200], 2)]
    expected = [greedy(tiny_llama_path, batch, TOKENS) for batch in batches]
    inside = ("ip", "netns", "exec", mac.namespace)
    args = ("--token", TOKEN, "--no-prompt-cache")

    def beside_vllm() -> None:
        """In vLLM's namespace, from where both are reached."""
        receiver = start_receiver(
            tiny_llama_path,
            tmp_path / "receiver.log",
            host=mac.address,
            args=args,
            inside=inside,
            key="k",
        )
        try:
            env = {"MAC_DECODE_OFFLOAD": "meet", "MAC_DECODE_TOKEN": TOKEN}
            vllm = start_vllm(
                tiny_llama_path,
                tmp_path / "vllm.log",
                receiver=receiver.address,
                args=("--max-num-batched-tokens", "256"),
                env=env,
            )
            try:
                vllm.wait_connected(receiver)
                for batch, tokens in zip(batches, expected, strict=True):
                    check(vllm, receiver, batch, tokens)
            finally:
                vllm.server.stop()
        finally:
            receiver.server.stop()

    with ThreadPoolExecutor(1, initializer=spark.enter) as there:
        there.submit(beside_vllm).result()


def check(
    vllm: Vllm, receiver: Receiver, batch: list[list[int]], expected: list[list[int]]
) -> None:
    """All at once are handed off, some of their KV is computed and the rest comes."""
    names = ("mlx_receiver_decoded_tokens_total", "mlx_receiver_computed_kv_bytes_total")
    before = [receiver.metric(name) for name in names]
    sent = vllm.metric("vllm:mac_decode_kv_bytes_total")
    with ThreadPoolExecutor(len(batch)) as pool:
        assert list(pool.map(lambda prompt: vllm.tokens(prompt, TOKENS), batch)) == expected
    decoded, computed = (
        receiver.metric(name) - start for name, start in zip(names, before, strict=True)
    )
    assert decoded == len(batch) * (TOKENS - 1)
    nbytes = sum(map(len, batch)) * A_TOKEN
    sent = vllm.metric("vllm:mac_decode_kv_bytes_total") - sent
    print(f"{len(batch)} prompts: {computed / nbytes:.0%} computed, {sent / nbytes:.0%} came")
    assert computed > 0.05 * nbytes and sent > 0.05 * nbytes
    assert computed + sent == nbytes
    receiver.assert_idle()
    vllm.tokens([5, 6, 7], 2)  # vLLM frees blocks in its next step
    assert eventually(lambda: vllm.metric("vllm:kv_cache_usage_perc") == 0)
