"""``mac-decode plan``: what it prints, draws and refuses."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from mlx_receiver.planning import cached, topology
from mlx_receiver.planning.plan import NAMES, plan
from mlx_receiver.planning.published import PUBLISHED
from mlx_receiver.planning.shown import Shown
from mlx_receiver.wire.messages import DataPath
from mlx_receiver.wire.profile import Coding, Decode, Prefill, Profile
from tests.conftest import free_port
from vllm_mac_decode.tools.cli import app
from vllm_mac_decode.tools.plan import picture, show, sources
from vllm_mac_decode.tools.receiver_http import HttpError

LLAMA = next(one.config for one in PUBLISHED if one.name == "Llama-3.1-8B")
DEMO = topology.load(topology.DEFAULT).situation("Llama-3.1-8B", 8192, 32)


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "120"})
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(autouse=True)
def _nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither here, nor by a receiver that may run on this machine."""
    monkeypatch.setattr(cached, "read_all", lambda side: [])
    monkeypatch.setenv("MAC_DECODE_RECEIVER_HTTP", f"http://127.0.0.1:{free_port()}")


def test_a_table_a_sentence_and_a_picture() -> None:
    text = run("--model", "Llama-3.1-8B", "--topology", "spark+m3-ultra@10gbe")
    assert "8,192 tokens in, 32 out" in text
    for name in NAMES.values():
        assert name in text
    made = plan(DEMO)
    assert f"{made.chosen.total:.2f} s" in text
    assert "Split, KV streamed, as soon as meet in the middle" in text
    assert "█" in text
    assert "━" in text


def test_without_a_topology_it_says_what_it_took() -> None:
    text = " ".join(run("--model", "gpt-oss-120b").split())
    assert "No profile of vLLM and the receiver" in text
    assert "spark+m3-ultra@10gbe; --topology names another one" in text
    assert "Meeting in the middle is not possible" in text


def test_json() -> None:
    found = json.loads(run("--model", "Llama-3.1-8B", "--prompt", "8192", "--json"))
    assert found["chosen"] == "split"
    assert set(found["strategies"]) == {"vllm", "split", "mac", "meet"}
    split = found["strategies"]["split"]
    assert split["kv_bytes"] == 131_072 * 8192
    assert split["total_s"] == pytest.approx(plan(DEMO).chosen.total)
    assert {span["lane"] for span in split["spans"]} == {"vllm", "link", "mac"}
    assert found["vllm"]["source"] == "hardware"


SLOW_LINK = ["--model", "Llama-3.1-8B", "--topology", "spark+m3-ultra@1gbe", "--output", "512"]


def by_codec(*arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*SLOW_LINK, *arguments, "--json"))
    return found


def test_what_each_codec_would_give(monkeypatch: pytest.MonkeyPatch) -> None:
    found = by_codec()
    assert found["strategies"]["split"]["codec"] == "raw", "as without the setting"
    ways = found["split_by_codec"]
    assert list(ways) == ["raw", "q8", "q4"]
    totals = [way["total_s"] for way in ways.values()]
    assert totals == sorted(totals, reverse=True), "a link that slow"
    assert ways["q8"]["kv_bytes"] == pytest.approx(0.53 * ways["raw"]["kv_bytes"], rel=0.01)
    assert ways["raw"]["encode_bytes_per_s"] is None
    assert ways["q4"]["decode_bytes_per_s"] == 0.65e9
    for name in ("raw", "q8", "q4"):
        planned = by_codec("--codec", name)["strategies"]
        assert planned["split"]["codec"] == name
        assert planned["split"]["total_s"] == ways[name]["total_s"]
        assert planned["meet"]["codec"] == "raw"
    assert by_codec("--codec", "auto")["strategies"]["split"]["codec"] == "q8", (
        "q4 is not asked for"
    )
    monkeypatch.setenv("MAC_DECODE_CODEC", "q4")
    assert by_codec()["strategies"]["split"]["codec"] == "q4"
    text = " ".join(run(*SLOW_LINK, "--codec", "q4").split())
    assert "split, KV streamed, by codec" in text and "0.65 GB/s" in text
    assert "of the transfer in q4 show" in text


def test_an_automatic_codec_is_the_one_that_vllm_s_side_would_choose(tmp_path: Path) -> None:
    """On a link as fast as both sides quantise: it follows what they do."""
    machines = tmp_path / "machines.toml"
    for rate, codec in ((3e9, "q8"), (0.3e9, "raw")):
        machines.write_text(
            f'[prefill]\ndevice = "spark"\nq8 = {rate}\n[decode]\ndevice = "m3-ultra"\n'
            f"q8 = {rate}\n[link]\nrate = 0.4e9\n"
        )
        arguments = ["--model", "Llama-3.1-8B", "--topology", str(machines), "--codec", "auto"]
        found = json.loads(run(*arguments, "--json"))
        assert found["strategies"]["split"]["codec"] == codec
        assert found["split_by_codec"]["q8"]["encode_bytes_per_s"] == rate
        assert found["mac"]["coding"]["q8"] == rate


def test_a_cache_that_cannot_be_quantised_has_no_codecs(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(LLAMA | {"head_dim": 80}))
    text = run("--model", str(config), "--topology", "spark+m3-ultra@1gbe", "--codec", "auto")
    assert "by codec" not in text
    found = json.loads(
        run("--model", str(config), "--topology", "spark+m3-ultra@1gbe", "--codec", "q8", "--json")
    )
    assert list(found["split_by_codec"]) == ["raw"]
    assert found["strategies"]["split"]["codec"] == "raw"


def test_what_the_receiver_says_of_itself_and_of_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its profile is in no file of vLLM's machine."""
    vllm, mac = (
        msgspec.structs.replace(side, source="measured") for side in (DEMO.pair.vllm, DEMO.pair.mac)
    )
    monkeypatch.setattr(
        cached, "read_all", lambda side: [SimpleNamespace(profile=vllm)] if side == "vllm" else []
    )
    links = {
        "a": DataPath("10.0.0.2", 3_000_000_000, 150_000),
        "b": DataPath("10.0.0.2", 250_000_000, 300_000, 1500),
        "not yet": DataPath("10.0.0.2", 0, 0),
    }
    asked: list[tuple[str, str]] = []

    def shown(base: str, path: str, kind: type[Shown], key: str) -> Shown:
        asked.append((base, key))
        return Shown(profile=mac, links=links)

    monkeypatch.setattr("vllm_mac_decode.tools.profile.sources.get", shown)
    arguments = ("--receiver-http", "http://mac:7791/", "--api-key", "secret")
    found = json.loads(run("--model", "Llama-3.1-8B", *arguments, "--json"))
    assert asked == [("http://mac:7791", "secret")]
    assert found["link"] == {"bytes_per_s": 250_000_000, "round_trip_s": pytest.approx(3e-4)}
    assert found["mac"]["source"] == "measured"
    assert "the link as measured to 10.0.0.2 (2.00 Gbit/s, 0.3 ms, MTU 1500)" in found["source"]
    other = run("--model", "gpt-oss-120b")
    assert "No profile of vLLM and the receiver" in " ".join(other.split())
    asked.clear()
    run("--model", "Llama-3.1-8B", "--topology", topology.DEFAULT)
    assert asked == [], "what is calculated asks nobody"


def says(monkeypatch: pytest.MonkeyPatch, shown: Shown) -> None:
    """A receiver answers so."""
    monkeypatch.setattr("vllm_mac_decode.tools.profile.sources.get", lambda *_: shown)


def test_why_a_receivers_own_figures_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    mac = profile("a Mac", "Llama-3.1-8B")
    at = ("--model", "Llama-3.1-8B", "--receiver-http", f"http://127.0.0.1:{free_port()}")

    def said() -> str:
        found: str = json.loads(run(*at, "--json"))["source"]
        return found

    nobody = f"no receiver answers at {at[-1]}"
    assert said().endswith(f"a receiver that has measured itself; {nobody}.")
    measured(monkeypatch, vllm=[mac], receiver=[mac])
    assert f"the receiver's as this machine has kept it: {nobody}; the link" in said()
    says(monkeypatch, Shown(profile=profile("a Mac", "another\x1b[2J")))
    assert f"the receiver at {at[-1]} has another [2J; the link" in said()
    says(monkeypatch, Shown())
    assert f"the receiver at {at[-1]} has not measured itself yet; the link" in said()
    says(monkeypatch, Shown(profile=mac))
    assert said() == "From both sides' profiles; the link is taken to be 10gbe."


def test_what_others_say_moves_no_cursor(monkeypatch: pytest.MonkeyPatch) -> None:
    mac = msgspec.structs.replace(profile("a Mac\x1b[2J", "Llama-3.1-8B"), kv_bytes=1)
    measured(monkeypatch, vllm=[mac])
    says(monkeypatch, Shown(profile=mac, links={"a": DataPath("10.0.0.2\x1b[2J", 1 << 30, 0)}))
    text = run("--model", "Llama-3.1-8B")
    assert "10.0.0.2 [2J" in text and "a Mac [2J has some" in text and "\x1b" not in text


def test_connections_of_each_worker_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the setting says, by which vLLM's side plans, too."""
    one = profile("a", "Llama-3.1-8B")
    mac = msgspec.structs.replace(one, coding=Coding(1e9, 1e9, 4))
    measured(monkeypatch, vllm=[one], receiver=[mac])
    for streams, rate in (("", 1e9), ("auto", 1e9), ("3", 3e9)):
        monkeypatch.setenv("MAC_DECODE_STREAMS", streams)
        found = json.loads(run("--model", "Llama-3.1-8B", "--json"))["split_by_codec"]["q8"]
        assert found["decode_bytes_per_s"] == rate
    monkeypatch.setenv("MAC_DECODE_STREAMS", "none")
    assert "streams" in run("--model", "Llama-3.1-8B", code=2)


def test_a_receiver_that_wants_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> Shown:
        raise HttpError("http://mac:7791 wants a key")

    monkeypatch.setattr("vllm_mac_decode.tools.profile.sources.get", refused)
    assert "wants a key" in run("--model", "Llama-3.1-8B", code=2)


def test_a_codec_that_is_none() -> None:
    assert "'q6' is not one of" in run("--model", "Llama-3.1-8B", "--codec", "q6", code=2)


def test_a_drawing(tmp_path: Path) -> None:
    path = tmp_path / "plan.svg"
    assert f"Written: {path}" in run("--model", "Llama-3.1-8B", "--svg", str(path))
    drawn = ElementTree.fromstring(path.read_text())
    kinds = "{http://www.w3.org/2000/svg}"
    words = [text.text or "" for text in drawn.iter(f"{kinds}text")]
    assert set(NAMES.values()) <= set(words)
    assert sum(word.startswith("by codec: raw ") for word in words) == 1
    made = plan(DEMO)
    rectangles = [
        one for one in drawn.iter(f"{kinds}rect") if one.find(f"{kinds}title") is not None
    ]
    spans = [span for one in made.predictions for span in one.spans if span.end > span.begin]
    assert len(rectangles) == len(spans)
    # As long as what they stand for, on one scale.
    end = max(span.end for span in spans)
    widths = sorted(float(one.attrib["width"]) for one in rectangles)
    scale = widths[-1] / max(span.end - span.begin for span in spans)
    assert widths == pytest.approx(sorted((s.end - s.begin) * scale for s in spans), abs=0.9)
    assert all(
        float(one.attrib["x"]) + float(one.attrib["width"]) <= picture._WIDTH - picture._RIGHT + 1
        for one in rectangles
    )
    assert end > 0


def test_what_cannot_be_written(tmp_path: Path) -> None:
    text = run("--model", "Llama-3.1-8B", "--svg", str(tmp_path / "no" / "plan.svg"), code=1)
    assert "No such file" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "nowhere"], "no model nowhere: give the path"),
        (["--model", "Llama-3.1-8B", "--topology", "a+b@c"], "no device 'a' is known"),
        (["--model", "Llama-3.1-8B", "--topology", "nowhere.toml"], "No such file"),
        (["--model", "DeepSeek-V3"], "give the path of its config.json"),
        (["--model", "Llama-3.1-8B", "--prompt", "0"], "prompt"),
        (["--model", "Llama-3.1-8B", "--output", "0"], "output"),
    ],
)
def test_questions_that_make_no_sense(arguments: list[str], said: str) -> None:
    assert said in run(*arguments, code=2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 0}, "none of its layers keeps anything"),
        ({"num_hidden_layers": 10**30}, "cannot fit"),
        ({"num_kv_shared_layers": 10**9}, "none of its layers keeps anything"),
        ({"head_dim": 1e308}, "no model has such numbers"),
        ({"head_dim": -8}, "no model has such numbers"),
        ({"quantization_config": "fp8"}, "its quantization_config is none: 'fp8'"),
    ],
)
def test_configurations_that_are_none(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | changes))
    assert said in run("--model", str(tmp_path), code=2)


def test_a_configuration_without_end(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 200_000)
    assert "recursion" in run("--model", str(tmp_path), code=2)


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-that-name/x.toml"])
def test_names_that_are_no_paths(name: str) -> None:
    assert "no model" in run("--model", name, code=2)
    assert "no topology" in run("--model", "Llama-3.1-8B", "--topology", name, code=2)


def test_machines_that_compute_nothing(tmp_path: Path) -> None:
    path = tmp_path / "t.toml"
    path.write_text(
        '[prefill]\ndevice = "spark"\nflops = 1e-300\n[decode]\ndevice = "m3-ultra"\n'
        '[link]\nname = "10gbe"\n'
    )
    said = "Expected `float` >= 1.0 - at `$.prefill.flops`"
    assert said in run("--model", "Llama-3.1-8B", "--topology", str(path), code=2)
    assert "0xspark: Expected" in run(
        "--model", "gpt-oss-120b", "--topology", "0xspark+m3-ultra@1gbe", code=2
    )


def test_a_name_is_not_markup(tmp_path: Path) -> None:
    path = tmp_path / "a[red]b"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(LLAMA))
    assert "a[red]b: 8,192 tokens in" in run("--model", str(path))


# --- what was measured ------------------------------------------------------------------------


def profile(name: str, model: str) -> Profile:
    return Profile(name, model, Prefill(0.1, 1e-4, 0.0, 4096), Decode(0.01, 0.001, 0.0))


def measured(monkeypatch: pytest.MonkeyPatch, **sides: list[Profile]) -> None:
    def kept(side: str) -> list[Any]:
        return [SimpleNamespace(profile=each) for each in sides.get(side, [])]

    monkeypatch.setattr(cached, "read_all", kept)


def test_measured_profiles_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = profile("a Spark", "meta-llama/Llama-3.1-8B")
    measured(
        monkeypatch,
        vllm=[profile("another", "Qwen/Qwen3-8B"), wanted, profile("old", wanted.model)],
        receiver=[profile("a Mac", "/models/llama-3.1-8B")],
    )
    found, said = sources.situation("Llama-3.1-8B", 100, 10, "")
    assert found.pair.vllm is wanted
    assert found.pair.mac.device == "a Mac"
    assert "From both sides' profiles" in said
    named, said = sources.situation("Llama-3.1-8B", 100, 10, topology.DEFAULT)
    assert named.pair.vllm.device == "DGX Spark"
    assert "constants of spark+m3-ultra@10gbe" in said


def test_what_was_measured_needs_no_count_of_operations(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = "Nemotron-3-Nano-30B-A3B"
    assert "measure it instead" in run("--model", name, code=2)
    measured(monkeypatch, vllm=[profile("a Spark", name)], receiver=[profile("a Mac", name)])
    assert "From both sides' profiles" in run("--model", name)
    # A configuration is that of the folder's name, however it is given.
    folder = tmp_path / "Mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    measured(monkeypatch, vllm=[profile("a Spark", "Mine")], receiver=[profile("a Mac", "a/mine")])
    monkeypatch.chdir(folder)
    assert "From both sides' profiles" in run("--model", "./config.json")


def test_what_no_memory_holds_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    long = ("--model", "Llama-3.1-8B", "--prompt", str(1 << 24))
    assert "the KV of 16,777,248 tokens takes 2199 GB, and DGX Spark has" in run(*long)
    small = Profile(
        "a Mac", "Llama-3.1-8B", Prefill(0.01, 1e-3, 1e-8, 2048), Decode(0.02, 1e-3, 1e-7),
        kv_bytes=1 << 30,
    )  # fmt: skip
    measured(monkeypatch, vllm=[small], receiver=[small])
    assert "a Mac has some 1 GB for it" in run("--model", "Llama-3.1-8B")
    assert "GB for it" not in run("--model", "Llama-3.1-8B", "--prompt", "8000")


def test_one_side_alone_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, vllm=[profile("a Spark", "Llama-3.1-8B")])
    found, said = sources.situation("Llama-3.1-8B", 100, 10, "")
    assert found.pair.vllm.device == "DGX Spark"
    assert "No profile of the receiver with this model" in said


# --- drawing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [1e-4, 0.7, 1.0, 6.2, 99.0, 1e5])
def test_ticks_are_few_and_reach_the_end(end: float) -> None:
    ticks = show.ticks(end, 8)
    assert ticks[0] == 0
    assert len(ticks) <= 9
    assert ticks[-1] <= end
    assert end < 0.01 or len(ticks) >= 3


def test_narrow_terminals() -> None:
    made = plan(DEMO)
    assert all(len(line) <= 60 for line in show.picture(made, 60)[:-2])


def test_one_token_alone() -> None:
    made = plan(topology.load(topology.DEFAULT).situation("Llama-3.1-8B", 8192, 1))
    assert "there is one token to produce" in made.why
    ElementTree.fromstring(picture.svg(made))
    assert show.picture(made, 80)
