"""``mlx-receiver profile``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mlx_receiver.cli import app
from mlx_receiver.decode import measuring
from mlx_receiver.planning import cached
from tests.mlx_receiver.client import started


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cached.CACHE_VARIABLE, str(tmp_path))
    # Tests run beside one another.
    monkeypatch.setattr(cached, "MOST_ERROR", 100.0)
    monkeypatch.setattr(measuring, "_GROWN", 512)
    monkeypatch.setattr(measuring, "_BATCHES", ((32, 1), (64, 2)))


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["profile", *arguments])
    return result.exit_code, result.output


def test_it_says_how_fast_quantised_kv_is_decoded(tiny_qwen3_path: Path) -> None:
    code, text = run("--model", str(tiny_qwen3_path))
    (saved,) = cached.read_all("receiver")
    coding = saved.profile.coding
    assert code == 0 and coding.q8 > 0
    assert f"becomes {coding.q8 / 1e9:.2f} GB/s (q8) or {coding.q4 / 1e9:.2f} GB/s (q4)" in text


def test_what_it_measures_is_the_receivers(tiny_llama_path: Path) -> None:
    code, text = run("--model", str(tiny_llama_path))
    assert code == 0 and "tokens/s" in text and "a receiver with this model begins" in text
    (saved,) = cached.read_all("receiver")
    with started(tiny_llama_path) as receiver:
        assert receiver.speed is not None and receiver.speed.saved == saved
    code, text = run("--model", str(tiny_llama_path), "--json")
    told = json.loads(text.splitlines()[-1])
    assert code == 0 and told["made"] > saved.made, "measured once more"


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ([], "--model names the model"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--model", "x", "--dtype", "int3"], "--dtype int3"),
        (["--model", "x", "--max-batch", "0"], "--max-batch"),
    ],
)
def test_what_cannot_be_measured(options: list[str], names: str) -> None:
    code, text = run(*options)
    assert code == 2 and names in text and len(text.splitlines()) == 1
