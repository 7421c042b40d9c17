"""Requests that are planned, by profiles of machines that are about as fast: whoever does what, and
whatever requests say of the profiles meanwhile, the tokens are the same."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from mlx_receiver.planning import cached
from mlx_receiver.wire.profile import Decode, Prefill, Profile
from tests.e2e.test_handoff import prompt_of
from tests.mlx_alone import greedy
from tests.profiles import keep
from tests.servers import pair
from tests.waiting import eventually

pytestmark = [pytest.mark.server, pytest.mark.slow]

LENGTHS = (3, 40, 130, 257, 640, 1500)

VLLM = Profile("v", "m", Prefill(0.005, 1e-4, 0.0, 2048), Decode(0.012, 0.001, 0.0))
MAC = Profile("r", "m", Prefill(0.002, 4e-4, 0.0, 2048), Decode(0.006, 0.002, 0.0))


def test_every_plan_gives_the_same_tokens(
    tiny_llama_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cached.CACHE_VARIABLE, str(tmp_path / "cache"))
    keep(tiny_llama_path, VLLM, MAC)
    env = {"MAC_DECODE_OFFLOAD": "auto"}
    prompts = [prompt_of(length, length) for length in LENGTHS]
    expected = {tokens: greedy(tiny_llama_path, prompts, tokens) for tokens in (4, 48)}
    with pair(tiny_llama_path, tmp_path, env=env) as (vllm, receiver):

        def plans(**labels: str) -> float:
            return vllm.metric("vllm:mac_decode_plans_total", **labels)

        assert eventually(lambda: bool(receiver.health()["proofs"]), 60, 0.1)
        for tokens in (4, 48):
            for prompt, wanted in zip(prompts, expected[tokens], strict=True):
                assert vllm.tokens(prompt, tokens) == wanted
        with ThreadPoolExecutor(len(prompts)) as pool:  # beside each other, and held by both
            got = list(pool.map(lambda prompt: vllm.tokens(prompt, 48), prompts))
        assert got == expected[48]
        assert eventually(lambda: plans(reason="fastest") + plans(reason="kept") >= 17, 5, 0.2)
        assert plans(reason="unknown") == 0
        assert vllm.metric("vllm:mac_decode_plan_error_ratio_count") >= 10
        assert vllm.metric("vllm:mac_decode_fallbacks_total") == 0
        receiver.assert_idle()
        for seen in httpx.get(f"{receiver.url}/handoffs").json():
            assert seen["plan"].startswith(f"{seen['strategy']} (") or not seen["plan"]
