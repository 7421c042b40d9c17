"""Whatever happens to the receiver, every response completes and is right."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.faults import run
from mlx_receiver.planning import cached
from mlx_receiver.wire.profile import Decode, Prefill, Profile
from tests.e2e.test_auto import VLLM
from tests.profiles import keep

pytestmark = pytest.mark.server


@pytest.mark.parametrize(("offload", "trials"), [("always", 12), ("mac", 6)])
def test_random_faults_under_load(
    tiny_llama_path: Path,
    tmp_path: Path,
    offload: str,
    trials: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MAC_DECODE_OFFLOAD", offload)
    result = run(tiny_llama_path, tmp_path, trials=trials, seed=5)
    assert result["responses_wrong"] == 0, result["problems"]
    assert result["responses_right"] >= trials * 20 / 12
    assert result["fell_back"]["all"] > 0
    assert result["decoded_by_receiver"] > 0


def test_random_faults_while_requests_are_planned(
    tiny_llama_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a link so slow, to a receiver that is taken for so fast until it has shown better, that
    most ways to share the work are the fastest for some of them."""
    monkeypatch.setenv(cached.CACHE_VARIABLE, str(tmp_path / "cache"))
    mac = Profile("r", "m", Prefill(0.002, 3e-4, 0.0, 2048), Decode(0.001, 2e-4, 0.0))
    keep(tiny_llama_path, VLLM, mac, max_num_batched_tokens=256)
    monkeypatch.setenv("MAC_DECODE_OFFLOAD", "auto")
    slow = {"rate": "20mbit", "burst": "64kb", "limit": "1mb"}
    result = run(tiny_llama_path, tmp_path, trials=4, seed=203, prompts=12, link=slow)
    assert result["responses_wrong"] == 0, result["problems"]
    assert result["decoded_by_receiver"] > 0
    ways = [way for way in ("split", "mac", "meet") if result["plans"][way]]
    assert len(ways) >= (1 if result["unplug_skipped"] else 2), result["plans"]
    if not result["unplug_skipped"]:
        assert set(result["actions"]) == {"kill", "freeze", "unplug"}
    # Profiles, the link and the texts' lengths are still known, or again.
    asked = result["asked_afterwards"]
    assert asked > 6 and sum(result["plans_afterwards"].values()) == asked
