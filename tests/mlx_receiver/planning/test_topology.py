"""Topologies: names, files, and what is wrong with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mlx_receiver.planning import topology
from mlx_receiver.planning.coding import ASSUMED
from mlx_receiver.planning.cost import Load, Strategy, Work
from mlx_receiver.planning.plan import plan

FILE = """
[prefill]
device = "spark"
count = 2
tokens = 4096
batch = 3
bits = 8

[decode]
device = "m3-ultra"
bandwidth = 1e12
reads = 0.5
memory = 512e9
tokens = 1000
wait = 0.25

[link]
name = "thunderbolt-5"
rate = 3e9
queued = 1e9
"""


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "machines.toml"
    path.write_text(text)
    return str(path)


def test_a_file(tmp_path: Path) -> None:
    found = topology.load(written(tmp_path, FILE)).situation("Llama-3.1-8B", 8192, 64)
    assert found.work == Work(8192, 64, 4096, 1000)
    assert found.load == Load(0.0, 3, 0.25, 0, 1e9)
    assert found.pair.vllm.device == "2 x DGX Spark"
    assert found.pair.mac.bandwidth == 0.5e12
    assert found.pair.link.rate == 3e9
    assert found.pair.link.round_trip == 300e-6
    # A quarter of the bytes of one Spark with 16 bits.
    alone = topology.load("spark+m3-ultra@10gbe").situation("Llama-3.1-8B", 8192, 64)
    step = alone.pair.vllm.decode.seconds(0) / found.pair.vllm.decode.seconds(0)
    assert step == pytest.approx(4, rel=0.01)


def test_how_fast_devices_quantise(tmp_path: Path) -> None:
    """Where a file says it; otherwise as everywhere where nobody does."""
    unsaid = topology.load(written(tmp_path, FILE)).situation("Llama-3.1-8B", 8192, 64)
    assert [way.name for way in unsaid.codecs] == ["raw", "q8", "q4"]
    assert {way.encode for way in unsaid.codecs[1:]} == {ASSUMED["q8"]}
    assert {way.decode for way in unsaid.codecs[1:]} == {ASSUMED["q8"]}
    text = FILE.replace("bits = 8", "q8 = 20e9").replace("wait = 0.25", "q8 = 1e9\nq4 = 2e9")
    _, q8, q4 = topology.load(written(tmp_path, text)).situation("Llama-3.1-8B", 8192, 64).codecs
    assert (q8.encode, q8.decode) == (2 * 20e9, 2 * 1e9), "two machines, a connection each"
    assert (q4.encode, q4.decode) == (ASSUMED["q4"], 2 * 2e9)
    wide = text.replace("queued = 1e9", "streams = 3")
    _, q8, _ = topology.load(written(tmp_path, wide)).situation("Llama-3.1-8B", 8192, 64).codecs
    assert (q8.encode, q8.decode) == (2 * 20e9, 6 * 1e9)
    few = wide.replace("q4 = 2e9", "threads = 4")
    _, q8, _ = topology.load(written(tmp_path, few)).situation("Llama-3.1-8B", 8192, 64).codecs
    assert q8.decode == 4 * 1e9


def test_what_is_held_is_a_beginning_for_the_same_codec() -> None:
    found = topology.load("spark+m3-ultra@1gbe").situation("Llama-3.1-8B", 8192, 32)
    found = replace(found, work=replace(found.work, held=8000))
    raw, q8, _ = found.codecs
    held, anew = found.predict(Strategy.SPLIT, raw), found.predict(Strategy.SPLIT, q8)
    assert held.kv_bytes == 131_072 * 192 and anew.kv_bytes == pytest.approx(
        131_072 * 8192 * 0.53, rel=0.01
    )
    kept = replace(found, held_in="q8").predict(Strategy.SPLIT, q8)
    assert kept.kv_bytes == pytest.approx(0.53 * held.kv_bytes, rel=0.01)


def test_names() -> None:
    one = topology.load("2xspark+m4-max@2.5gbe")
    assert (one.prefill.device, one.prefill.count) == ("spark", 2)
    assert (one.decode.device, one.decode.count) == ("m4-max", 1)
    assert one.link.name == "2.5gbe"
    assert topology.load(topology.DEFAULT).prefill.count == 1


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("spark", "no topology spark: give a file.toml, or PREFILL"),
        ("spark+m3-ultra", "no topology"),
        ("spark+m3-ultra@", "no topology"),
        ("h100+m3-ultra@10gbe", "no device 'h100' is known: take one of spark, "),
        ("spark+m3-ultra@string", "no link 'string' is known: take one of 10gbe, "),
        ("0xspark+m3-ultra@10gbe", "count"),
        ("nowhere.toml", r"nowhere\.toml: No such file"),
    ],
)
def test_names_that_are_none(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        topology.load(name)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('device = "spark"', 'device = "abacus"', "no device 'abacus'"),
        ("count = 2", "count = 0", r"count"),
        ("count = 2", "counts = 2", "counts"),
        ("reads = 0.5", "reads = 1.5", "reads"),
        ("rate = 3e9", "rate = -1", "rate"),
        ("rate = 3e9", "rate = nan", r"link\.rate"),
        ("wait = 0.25", "q8 = nan", r"decode\.q8"),
        ("wait = 0.25", "q8 = inf", r"decode\.q8"),
        ("wait = 0.25", "q8 = 0", r"decode\.q8"),
        ("wait = 0.25", "q4 = -1e9", r"decode\.q4"),
        ("wait = 0.25", "q6 = 1e9", r"q6"),
        ("wait = 0.25", "threads = 0", r"threads"),
        ("rate = 3e9", "streams = 0", r"streams"),
        ("rate = 3e9", 'rate = "fast"', "rate"),
        ('name = "thunderbolt-5"', 'name = "string"', "no link 'string'"),
        ("[link]", "[cable]", "cable"),
        ("[link]", "[link", "machines.toml"),
    ],
)
def test_files_that_are_wrong(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in FILE
    with pytest.raises(ValueError, match=rf"machines\.toml: .*{said}|{said}"):
        topology.load(written(tmp_path, FILE.replace(old, new, 1)))


def test_a_link_needs_a_name_or_a_rate(tmp_path: Path) -> None:
    sides = '[prefill]\ndevice = "spark"\n[decode]\ndevice = "m3-ultra"\n[link]\n'
    with pytest.raises(ValueError, match=r"\[link\] has no name: take one of"):
        topology.load(written(tmp_path, sides))
    found = topology.load(written(tmp_path, sides + "rate = 5e8\nround_trip = 0.01\n"))
    assert found.link.link() == topology.Link(5e8, 0.01)


def test_what_does_not_fit_is_said() -> None:
    found = topology.load(topology.DEFAULT).situation("GLM-4.5-Air", 8192, 32)
    (note,) = found.notes
    assert "214 GB" in note
    assert "DGX Spark" in note
    assert not topology.load("2xspark+m3-ultra@10gbe").situation("GLM-4.5-Air", 8, 8).notes


# --- what is made of it ---------------------------------------------------------------------


def chosen(name: str, model: str = "Llama-3.1-8B", prompt: int = 8192, output: int = 256) -> str:
    made = plan(topology.load(name).situation(model, prompt, output))
    assert made.chosen.total == min(one.total for one in made.predictions)
    assert made.why.endswith(".")
    return made.chosen.strategy.value


def test_what_is_chosen() -> None:
    assert chosen("spark+m3-ultra@10gbe") == "split"
    assert chosen("spark+m3-ultra@1gbe") == "meet"
    assert chosen("spark+m3-ultra@1gbe", output=32) == "vllm"
    assert chosen("spark+m3-ultra@10gbe", output=1) == "vllm"
    assert chosen("spark+m5-max@2.5gbe", "gpt-oss-120b") == "mac"


def test_a_long_conversation_that_the_mac_holds(tmp_path: Path) -> None:
    held = '[prefill]\ndevice = "spark"\n[decode]\ndevice = "m3-ultra"\ntokens = 30000\n'
    file = written(tmp_path, held + '[link]\nname = "10gbe"\n')
    assert chosen(file, prompt=30_100) == "mac"


def test_states_and_windows_cannot_meet() -> None:
    for model in ("gpt-oss-120b", "Qwen3.5-35B-A3B"):
        made = plan(topology.load("spark+m3-ultra@1gbe").situation(model, 8192, 256))
        assert made.of(Strategy.MEET) is None
        assert len(made.predictions) == 3
