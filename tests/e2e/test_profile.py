"""Both sides measure themselves beside real requests, which notice nothing of it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mlx_receiver.planning import cached
from tests.mlx_alone import greedy
from tests.servers import start_receiver, start_vllm
from tests.waiting import eventually
from vllm_mac_decode.tools.cli import app

pytestmark = pytest.mark.server

PROMPTS = [list(range(3, 3 + length)) for length in (5, 40, 200, 600)]


def test_it_is_measured_once_beside_requests(
    tiny_qwen3_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cached.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv("MAC_DECODE_PROFILE", "true")
    expected = greedy(tiny_qwen3_path, PROMPTS, 12)
    receiver = start_receiver(tiny_qwen3_path, tmp_path / "receiver.log", args=("--profile",))
    try:
        vllm = start_vllm(tiny_qwen3_path, tmp_path / "vllm.log", receiver=receiver.address)
        try:
            log = vllm.server.log
            assert eventually(lambda: bool(receiver.health()["proofs"]), 60, 0.2)
            asked = 0
            until = time.monotonic() + 150
            while "vLLM measured in" not in log.read_text() and time.monotonic() < until:
                for prompt, tokens in zip(PROMPTS, expected, strict=True):
                    assert vllm.tokens(prompt, 12) == tokens
                asked += len(PROMPTS)
                time.sleep(4)
            assert "vLLM measured in" in log.read_text()

            def settled(side: str, log: Path) -> bool:
                """A machine with other work says so, and keeps nothing."""
                sides = {saved.side for saved in cached.read_all()}
                return side in sides or "the profile is not kept" in log.read_text()

            assert eventually(lambda: settled("vllm", log), 10, 0.1)
            assert eventually(lambda: settled("receiver", receiver.server.log), 60, 0.1)
            kept = cached.read_all()
            for saved in kept:
                assert 0 < saved.seconds < 60 and saved.samples > 5
                profile = saved.profile
                assert 0 < profile.prefill.seconds(100) < profile.prefill.seconds(2000)
                assert 0 < profile.decode.seconds(100, 1) <= profile.decode.seconds(100, 4)
                coding = profile.coding
                assert 1e6 < coding.q8 < 1e12 and 1e6 < coding.q4 < 1e12
                assert coding.threads == 1 if saved.side == "vllm" else coding.threads >= 1
            if len(kept) == 2:  # is planned with; nobody measures a loopback link
                words = ["plan", "--model", str(tiny_qwen3_path), "--receiver-http", receiver.url]
                text = " ".join(CliRunner().invoke(app, words).output.split())
                assert "both sides' profiles; the link is taken to be 10gbe" in text
            # Nobody's requests are nobody's: users and metrics do not see them.
            assert vllm.metric("vllm:request_success_total") == asked
            assert vllm.metric("vllm:prompt_tokens_total") == asked // len(PROMPTS) * sum(
                map(len, PROMPTS)
            )
            assert vllm.metric("vllm:num_requests_running") == 0
            assert vllm.metric("vllm:num_requests_waiting") == 0
        finally:
            vllm.server.stop()
        vllm = start_vllm(tiny_qwen3_path, tmp_path / "again.log", receiver=receiver.address)
        try:
            for prompt, tokens in zip(PROMPTS, expected, strict=True):
                assert eventually(lambda p=prompt, t=tokens: vllm.tokens(p, 12) == t, 20, 0.2)
            time.sleep(5)
            if any(saved.side == "vllm" for saved in kept):
                assert "vLLM measured" not in vllm.server.log.read_text()
        finally:
            vllm.server.stop()
    finally:
        receiver.server.stop()
