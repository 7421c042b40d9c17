"""A user who sets nothing: each request is done in the way that is predicted to be the fastest, by
profiles that make both ways happen, and whoever decodes, the tokens are the same."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from mlx_receiver.planning import cached
from mlx_receiver.wire.profile import Decode, Prefill, Profile
from tests.e2e.test_handoff import prompt_of
from tests.mlx_alone import greedy
from tests.profiles import keep
from tests.servers import Receiver, Vllm, start_receiver, start_vllm
from tests.vllm_mac_decode.tools.test_cli import mac_decode
from tests.waiting import eventually
from vllm_mac_decode.scheduler.order import HAND_OFF, KEEP
from vllm_mac_decode.tools.bench.servers import Pair, Server
from vllm_mac_decode.tools.quality.engines import Engines

pytestmark = pytest.mark.server

#: A step of vLLM's lasts a second, one of the receiver's a hundredth for each token that the text
#: has; its prefill is out of the question.
VLLM = Profile("v", "m", Prefill(0.0, 1e-4, 0.0, 256), Decode(1.0, 0.0, 0.0))
MAC = Profile("r", "m", Prefill(0.0, 10.0, 0.0, 2048), Decode(0.0, 0.0, 0.01))

SHORT, LONG = prompt_of(16, 1), prompt_of(1000, 2)
#: So few that what they took is no reason yet to believe no profile (``planning/live.py``).
FEW = 3


@pytest.fixture
def served(
    tiny_llama_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Vllm, Receiver]]:
    """Both servers with the default, connected and proven; nothing was asked of them."""
    monkeypatch.setenv(cached.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv("MAC_DECODE_OFFLOAD", raising=False)
    keep(tiny_llama_path, VLLM, MAC, max_num_batched_tokens=256)
    receiver = start_receiver(tiny_llama_path, tmp_path / "receiver.log")
    try:
        vllm = start_vllm(
            tiny_llama_path,
            tmp_path / "vllm.log",
            receiver=receiver.address,
            args=("--max-num-batched-tokens", "256", "--enable-prompt-tokens-details"),
        )
        try:
            assert eventually(lambda: bool(receiver.health()["proofs"]), 60, 0.1)
            yield vllm, receiver
        finally:
            vllm.server.stop()
    finally:
        receiver.server.stop()


def plans(vllm: Vllm, strategy: str, reason: str) -> float:
    return vllm.metric("vllm:mac_decode_plans_total", strategy=strategy, reason=reason)


def told(receiver: Receiver) -> list[dict[str, Any]]:
    return [one for one in httpx.get(f"{receiver.url}/handoffs").json() if one["plan"]]


def test_each_request_is_done_in_the_way_that_is_the_fastest(
    tiny_llama_path: Path, served: tuple[Vllm, Receiver]
) -> None:
    vllm, receiver = served
    few = greedy(tiny_llama_path, [SHORT, LONG], FEW)
    assert vllm.tokens(SHORT, FEW) == few[0]
    assert vllm.tokens(LONG, FEW) == few[1]
    assert eventually(lambda: plans(vllm, "vllm", "fastest") == 1, 10, 0.1)
    assert plans(vllm, "split", "fastest") == 1
    assert vllm.metric("vllm:mac_decode_local_total", reason="planned") == 1
    assert vllm.metric("vllm:mac_decode_tokens_total") == FEW - 1
    (handed,) = told(receiver)
    assert handed["plan"].startswith("split (fastest: vllm ")

    # Who asks for it gets a hand-off, or none; a router, too.
    assert vllm.tokens(LONG, FEW, **HAND_OFF) == few[1]
    assert vllm.tokens(SHORT, FEW, **KEEP) == few[0]
    assert [one["plan"] for one in told(receiver)][1:] == ["split (request)"]
    routed = vllm.complete(LONG, 1, kv_transfer_params={"do_remote_decode": True})
    assert routed["kv_transfer_params"]["mac_decode"]["session"] is not None

    # So do the tools that are about hand-offs.
    servers = Server(vllm.url, "--vllm"), Server(receiver.url, "--receiver-http")
    engines = Engines(*servers)
    engines.look()
    engines.handed_off([*LONG, 5, 6])
    timed = Pair(*servers, 1000, FEW)
    assert len(timed.vllm_alone()) == len(timed.together()[0]) == FEW

    # By now what they take is known, and whatever is chosen, the tokens are the same.
    many = [prompt_of(length, length) for length in (16, 64, 300, 1000)] * 2
    expected = greedy(tiny_llama_path, many[:4], 20) * 2
    with ThreadPoolExecutor(len(many)) as pool:
        answers = list(pool.map(lambda prompt: vllm.complete(prompt, 20, ignore_eos=True), many))
    assert [answer["choices"][0]["token_ids"] for answer in answers] == expected
    for prompt, answer in zip(many, answers, strict=True):
        usage = answer["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(prompt), 20)
        cached_tokens = (usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0
        assert cached_tokens < len(prompt)
    assert vllm.metric("vllm:mac_decode_fallbacks_total") == 0

    log = vllm.server.log.read_text()
    assert log.count("both sides' profiles are known") == 1
    assert log.count("vLLM alone is predicted to be the fastest") == 1
    assert "for a request of 1000 tokens (some 3 out)" in log

    shown = mac_decode("trace", "--receiver-http", receiver.url, "--request", handed["request_id"])
    assert shown.returncode == 0, shown.stderr
