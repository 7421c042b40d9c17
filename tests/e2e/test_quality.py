"""`mac-decode check --quality` on a pair that runs: equal weights, other ones, and what is said
when there is nothing to measure."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import free_port
from tests.models import tiny_llama
from tests.servers import Receiver, Vllm, start_receiver, start_vllm
from tests.vllm_mac_decode.tools.test_cli import mac_decode
from vllm_mac_decode.tools.bench.servers import BenchError, Server
from vllm_mac_decode.tools.quality.engines import Engines, NotHandedOff
from vllm_mac_decode.tools.quality.figures import divergence
from vllm_mac_decode.tools.quality.measure import Options, measure

pytestmark = pytest.mark.server

TEXT = "Seven boats left the harbour before noon, and six of them came back in the evening. " * 2


def engines(vllm: Vllm, receiver: str) -> Engines:
    return Engines(Server(vllm.url, "--vllm"), Server(receiver, "--receiver-http"))


def check(vllm: Vllm, receiver: Receiver, *arguments: object) -> Any:
    return mac_decode(
        *("check", "--quality", "--vllm", vllm.url, "--receiver-http", receiver.url), *arguments
    )


def test_equal_weights_give_equal_distributions(
    vllm: Vllm, receiver: Receiver, tmp_path: Path
) -> None:
    text = tmp_path / "boats.txt"
    text.write_text(TEXT)
    before = receiver.metric("mlx_receiver_kv_bytes_total")
    done = check(vllm, receiver, "--json", "--quality-text", text)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["whole"]
    assert found["texts"] == {"boats.txt": pytest.approx(36, abs=20)}
    assert found["text"]["positions"] >= 16
    assert found["responses"]["positions"] == 8
    for figures in (found["text"], found["responses"]):
        for way in ("handoff_from_vllm", "handoff_from_mac", "engines"):
            assert figures[way]["worst_kl"] < 1e-5
            assert figures[way]["same_top_token"] == 1.0
            assert 0 < figures[way]["known"] <= 1.0
    perplexity = found["text"]["perplexity"]
    # Random weights know nothing of the text: about as many choices as there are tokens.
    assert 1e4 < perplexity["vllm"] < 1e8
    for name in ("vllm", "mac"):
        assert perplexity["handoff"] == pytest.approx(perplexity[name], rel=1e-4)
    assert found["finding"]["state"] == "fine"
    # It was handed off, each time: 2 KiB a token.
    assert receiver.metric("mlx_receiver_kv_bytes_total") - before > 2048 * 12 * 16


def test_the_three_ways_see_the_same_place(vllm: Vllm, receiver: Receiver) -> None:
    """A place beside the right one would be far away, and tokens are forced as they are asked
    for."""
    both = engines(vllm, receiver.url)
    both.look()
    tokens = both.read(TEXT)
    rows = both.vllm_alone(tokens)
    at = 20
    handoff, mac = both.handed_off(tokens[: at + 1]), both.mac_alone(tokens[: at + 1])
    for row in (handoff, mac):
        assert tokens[at] in row
        assert divergence(rows[at], row) < 1e-5
        assert divergence(rows[at - 1], row) > 0.01
        assert divergence(rows[at + 1], row) > 0.01
    answer = both.response(tokens[:at], 5)
    assert len(answer.rows) == 5
    assert (
        divergence(both.vllm_alone([*tokens[:at], *answer.tokens])[at + 3], answer.rows[3]) < 1e-5
    )


def test_other_weights_are_far(vllm: Vllm, tmp_path: Path) -> None:
    """The same measure tells two engines apart that differ, and misses hand-offs that go to
    another receiver."""
    other = tiny_llama(tmp_path / "other", seed=1)
    stranger = start_receiver(other, tmp_path / "other.log")
    try:
        both = engines(vllm, stranger.url)
        with pytest.raises(BenchError, match="no vLLM is connected to the receiver at"):
            both.look()
        tokens = both.read(TEXT)
        rows = both.vllm_alone(tokens)
        assert divergence(rows[20], both.mac_alone(tokens[:21])) > 0.01
        with pytest.raises(NotHandedOff, match="uses another receiver than"):
            both.handed_off(tokens[:21])
    finally:
        stranger.server.stop()


def test_time_bounds_it(vllm: Vllm, receiver: Receiver) -> None:
    options = Options(vllm.url, receiver.url, texts={"boats": TEXT}, seconds=0)
    with pytest.raises(
        BenchError, match=r"0 positions were measured in 0 s, at least 8 are needed"
    ):
        measure(options, lambda what, done: None)


def test_what_cannot_be_measured(vllm: Vllm, receiver: Receiver, tmp_path: Path) -> None:
    def said(*arguments: object, status: int = 1) -> str:
        done = check(vllm, receiver, *arguments)
        assert done.returncode == status, done.stdout
        assert done.stderr.startswith("mac-decode: ")
        assert done.stderr.count("\n") == 1
        return done.stderr

    nowhere = f"http://127.0.0.1:{free_port()}"
    assert "or say where it is with --vllm" in said("--vllm", nowhere)
    assert "or say where it is with --receiver-http" in said("--receiver-http", nowhere)
    missing, short, binary = (tmp_path / name for name in ("missing", "short", "binary"))
    short.write_text("Hello.")
    binary.write_bytes(b"\xff\xfe\x00")
    assert "No such file" in said("--quality-text", missing, status=2)
    assert "it is no text in UTF-8" in said("--quality-text", binary, status=2)
    assert "give a longer one" in said("--quality-text", short)


@pytest.mark.skipif(
    not os.environ.get("MAC_DECODE_ALL_FAMILIES"), reason="starts a vLLM of its own"
)
def test_a_hand_off_to_other_weights_shows(tiny_llama_path: Path, tmp_path: Path) -> None:
    """Without the proof that refuses them."""
    other = tiny_llama(tmp_path / "other", seed=1)
    receiver = start_receiver(other, tmp_path / "receiver.log")
    try:
        environment = {"MAC_DECODE_PROOF": "false"}
        vllm = start_vllm(
            tiny_llama_path, tmp_path / "vllm.log", receiver=receiver.address, env=environment
        )
        try:
            options = Options(vllm.url, receiver.url, texts={"boats": TEXT})
            found = measure(options, lambda what, done: None)
        finally:
            vllm.server.stop()
    finally:
        receiver.server.stop()
    assert found.text.handoff_from_vllm.mean_kl > 0.1
    assert found.text.engines.mean_kl > 0.1
    assert found.text.handoff_from_vllm.same_top_token < 0.5
