"""`mac-decode bench`: what it measures on two real servers, what it writes, when it gives up."""

from __future__ import annotations

import json
import random
import re
import xml.etree.ElementTree
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx.core")

from mlx_receiver.receiver import Receiver
from mlx_receiver.settings import Settings
from tests.conftest import free_port
from tests.mlx_receiver.client import HERE, started
from tests.servers import pair
from tests.vllm_mac_decode.tools.test_cli import mac_decode
from vllm_mac_decode.tools.bench import picture, record, run
from vllm_mac_decode.tools.bench.run import BenchError, Options, measure
from vllm_mac_decode.tools.bench.servers import Pair, Server

FEW = {"prompt_tokens": 24, "output_tokens": 4, "repeats": 2}


@pytest.fixture(scope="module")
def alone(tiny_llama_path: Path) -> Iterator[str]:
    """The URL of a receiver that no vLLM is connected to."""
    with started(tiny_llama_path, http_port=0) as receiver:
        assert receiver.http is not None
        yield f"http://127.0.0.1:{receiver.http.port}"


@pytest.mark.slow
@pytest.mark.server
def test_three_ways_on_two_real_servers(tiny_llama_path: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    secrets = {"MAC_DECODE_TOKEN": "hush-token"}
    arguments = ("--token", "hush-token")
    with pair(tiny_llama_path, tmp_path, receiver_args=arguments, env=secrets) as (vllm, receiver):
        before = receiver.metric("mlx_receiver_decoded_tokens_total")
        done = mac_decode(
            *("bench", "--vllm", vllm.url, "--receiver-http", receiver.url),
            *("--receiver", receiver.address, "--prompt-tokens", 300, "--output-tokens", 6),
            *("--repeats", 2, "--out", tmp_path / "out" / "result"),
            **secrets,
        )
        decoded = receiver.metric("mlx_receiver_decoded_tokens_total") - before
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out" / "result.json").read_text()
    result = json.loads(text)
    # Three rounds of 5 tokens after vLLM's first, and of 6 that are all MLX's.
    assert decoded == 3 * (5 + 6)
    assert set(result["ways"]) == set(record.WAYS)
    for way in result["ways"].values():
        assert len(way["runs"]) == 2
        assert 0 < way["first_token_s"]["p50"] < way["total_s"]["p50"] <= way["total_s"]["p90"]
    assert result["handoff"]["kv_bytes"] == 300 * 2048
    assert result["handoff"]["gap_ms"]["p50"] > 0
    assert result["link"]["gb_per_s"] > 0
    assert result["receiver"]["engine"].startswith("mlx ")
    assert "GiB" in result["receiver"]["machine"]
    assert result["vllm"]["hardware"]["cores"]
    assert result["model"] == tiny_llama_path.name  # not the name it is served under
    assert result["receiver_model"] == tiny_llama_path.name
    drawing = (tmp_path / "out" / "result.svg").read_text()
    for written in (text, drawing):
        assert "hush" not in written
        assert "127.0.0.1" not in written
        assert str(Path.home()) not in written
    assert "300 tokens in, 6 out" in drawing
    assert "together" in done.stdout


# --- when it gives up ---------------------------------------------------------------------------


def bench(**options: Any) -> dict[str, Any]:
    return measure(Options(**FEW | options), lambda what: None)


def test_nothing_there(alone: str) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(BenchError, match=r"nothing answers at .* or say where it is with --vllm"):
        bench(vllm=nowhere, receiver_http=alone)
    with pytest.raises(BenchError, match=r"nothing answers at .* with --receiver-http"):
        bench(vllm=alone, receiver_http=nowhere)
    with pytest.raises(BenchError, match="nothing answers"):
        bench(vllm="127.0.0.1", receiver_http=alone)


def test_the_command_says_it_in_one_line() -> None:
    done = mac_decode("bench", "--vllm", f"http://127.0.0.1:{free_port()}")
    assert done.returncode == 1
    assert done.stderr.startswith("mac-decode: nothing answers at")
    assert "Traceback" not in done.stderr


def test_a_receiver_without_a_vllm(alone: str) -> None:
    with pytest.raises(BenchError, match="no vLLM is connected to the receiver"):
        bench(vllm=alone, receiver_http=alone)


def test_a_key_that_is_missing(tiny_llama_path: Path) -> None:
    settings = Settings(
        model=str(tiny_llama_path), **HERE, port=0, http_port=0, kv_memory=1 << 28, api_key="k"
    )
    with Receiver(settings) as started:
        assert started.http is not None
        url = f"http://127.0.0.1:{started.http.port}"
        with pytest.raises(BenchError, match="wants its API key: --receiver-http-api-key"):
            Server(url, "--receiver-http").look()
        server = Server(url, "--receiver-http", "k")
        server.look()
        assert server.model


def test_a_prompt_that_does_not_fit(alone: str) -> None:
    server = Server(alone, "--vllm")
    with pytest.raises(BenchError, match="answers 400"):
        server.look()
        server.complete([5] * 9000, 4)


def test_the_receiver_says_what_it_runs_on(alone: str) -> None:
    health = Server(alone, "--receiver-http").document("/health")
    assert health["engine"] == f"mlx {metadata.version('mlx')}"
    assert re.fullmatch(r".+, \d+ GiB", health["machine"])


def test_a_link_that_is_not_timed_names_no_address(alone: str, tiny_llama_path: Path) -> None:
    vllm = Server(alone, "--vllm", root=str(tiny_llama_path))
    port = free_port()
    options = Options(alone, alone, receiver=f"127.0.0.1:{port}")
    link = run._link(options, vllm)
    assert link["gb_per_s"] is None
    assert "address" in link["why"]
    assert str(port) not in link["why"]
    vllm.root = "/no/such"
    assert "config.json" in run._link(options, vllm)["why"]


def test_a_request_that_was_not_handed_off(alone: str) -> None:
    """The receiver's own API in vLLM's place: what it answers was never handed off."""
    both = Pair(Server(alone, "--vllm"), Server(alone, "--receiver-http"), 24, 4)
    for server in (both.vllm, both.receiver):
        server.look()
    assert len(both.mac_alone()) == 4
    with pytest.raises(BenchError, match="vLLM decoded a request by itself"):
        both.together()


def test_kv_that_came_for_a_request_that_was_to_stay(
    alone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = Pair(Server(alone, "--vllm"), Server(alone, "--receiver-http"), 24, 4)
    for server in (both.vllm, both.receiver):
        server.look()
    counts = iter(range(10))
    monkeypatch.setattr(Server, "metric", lambda self, name: next(counts))
    with pytest.raises(BenchError, match="that vLLM was to keep"):
        both.vllm_alone()
    with pytest.raises(BenchError, match="start it without --prefill"):
        both.mac_alone()


# --- what is written ----------------------------------------------------------------------------


def test_percentiles() -> None:
    found = record.spread([4.0, 1.0, 3.0, 2.0, 5.0])
    assert found == {"p50": 3.0, "p90": 4.6, "min": 1.0, "max": 5.0}
    assert record.spread([1.0, 2.0])["p90"] == 1.9
    assert record.spread([7.0])["p90"] == 7.0


def test_figures_of_a_way() -> None:
    found = record.of_way([[1.0, 1.5, 1.6, 1.7], [3.0, 3.5, 3.6, 3.9]])
    assert found["first_token_s"]["p50"] == 2.0
    assert found["total_s"] == {"p50": 2.8, "p90": 3.68, "min": 1.7, "max": 3.9}
    # The step after the first token is the hand-off's.
    assert found["token_ms"]["p50"] == 100.0
    assert found["runs"] == [[1.0, 1.7], [3.0, 3.9]]


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
        ("/home/me/models/llama", "llama"),
        ("./secret/models/llama/", "llama"),
        ("C:\\Users\\me\\llama", "llama"),
        ("m", "m"),
    ],
)
def test_a_models_folder_is_nobodys_business(name: str, public: str) -> None:
    assert record.public_model(name) == public


def example(**changes: Any) -> dict[str, Any]:
    source = random.Random(3)

    def way(first: float, last: float) -> dict[str, Any]:
        slower = [source.uniform(1.0, 1.2) for _ in range(5)]
        return record.of_way([[first * s, (first + last) / 2 * s, last * s] for s in slower])

    return {
        "model": "a <model> & more",
        "prompt_tokens": 8192,
        "output_tokens": 32,
        "repeats": 5,
        "ways": {
            "vllm_alone": way(1.5, 4.3),
            "mac_alone": way(5.6, 6.4),
            "together": way(1.5, 2.3),
        },
        "handoff": {
            "kv_bytes": 1 << 30,
            "gap_ms": {"p50": 31.0, "p90": 40.0},
            "exposed_transfer_ms": {"p50": 9.0, "p90": 12.0},
        },
        "link": {"gb_per_s": 1.18},
        "vllm": {"version": "0.32.0", "hardware": {"gpus": ["NVIDIA GB10, 580"], "cpu": ""}},
        "receiver": {"engine": "mlx 0.32.4", "machine": None},
    } | changes


def test_the_picture_is_in_proportion() -> None:
    result = example()
    root = xml.etree.ElementTree.fromstring(picture.draw(result))
    texts = [element.text or "" for element in root.iter() if element.tag.endswith("text")]
    assert texts[0] == "a <model> & more: 8,192 tokens in, 32 out"
    assert any("NVIDIA GB10 + the receiver" in text and "1.18 GB/s" in text for text in texts)
    bars = [e for e in root.iter() if e.tag.endswith("rect") and e.get("height") == "38"]
    widths = [float(bar.get("width", 0)) for bar in bars]
    totals = [result["ways"][way]["total_s"]["p50"] for way in record.WAYS]
    assert [w / widths[0] for w in widths] == pytest.approx([t / totals[0] for t in totals], 0.01)
    # Nothing leaves the picture.
    assert max(widths) < float(root.get("width", 0)) - 132 - 150 + 1
    unknown = picture.draw(example(link={"gb_per_s": None, "why": "x"}))
    assert "GB/s" not in unknown
