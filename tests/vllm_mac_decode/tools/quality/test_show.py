"""The table, and the users' texts."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from vllm_mac_decode.settings import SettingsError
from vllm_mac_decode.tools.quality import command, texts
from vllm_mac_decode.tools.quality.figures import Spot, figures, verdict
from vllm_mac_decode.tools.quality.measure import Quality
from vllm_mac_decode.tools.quality.show import table

EVEN, SKEWED = ({0: math.log(p), 1: math.log(1 - p)} for p in (0.5, 0.8))


def measured(spots: list[Spot], whole: bool = True) -> Quality:
    found = figures(spots, with_perplexity=True)
    return Quality(
        model="org/M",
        receiver_model="M-4bit",
        receiver_dtype="bfloat16",
        texts={"prose": 90},
        whole=whole,
        seconds=1.0,
        text=found,
        responses=figures(spots[:2], with_perplexity=False),
        finding=verdict(found),
    )


def test_the_table_has_every_figure() -> None:
    console = Console(file=io.StringIO(), width=140)
    console.print(table(measured([Spot(0, EVEN, SKEWED, EVEN)] * 4)))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "org/M by vLLM, M-4bit (bfloat16) by the Mac" in shown
    assert "the texts, 4 positions" in shown
    assert "own responses, 2 tokens" in shown
    assert "0.193" in shown  # 0.8 ln 1.6 + 0.2 ln 0.4
    assert shown.count("100.0%") == 12
    assert "2.000, +0.750" in shown
    assert "2.000, +0.000" in shown


def test_what_the_command_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = command.options("v", "http://m", "", ("", ""), [], 1)
    bad = [Spot(0, EVEN, SKEWED, SKEWED)] * 9
    monkeypatch.setattr(command, "measure", lambda options, show: measured(bad, whole=False))
    assert command.run(chosen, as_json=False) == 1
    shown = capsys.readouterr().out
    assert "Time was up after 9 positions." in shown
    assert "✗ Perplexity 2.00 handed off, 1.25 by vLLM alone" in shown
    assert "→ Are both sides the same model" in shown
    good = [Spot(0, EVEN, EVEN, EVEN)] * 9
    monkeypatch.setattr(command, "measure", lambda options, show: measured(good))
    assert command.run(chosen, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["text"]["positions"] == 9


def test_texts_are_called_by_their_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for file in ("notes.txt", "a/notes.txt"):
        (tmp_path / file).write_text(file)
    found = texts.read([tmp_path / "notes.txt", tmp_path / "a" / "notes.txt"])
    assert found == {"notes.txt": "notes.txt", "notes.txt (2)": "a/notes.txt"}
    (tmp_path / "empty").write_text(" \n")
    with pytest.raises(ValueError, match="is empty"):
        texts.read([tmp_path / "empty"])


def test_the_receivers_http_port_is_beside_its_control_port(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MAC_DECODE_RECEIVER", raising=False)

    def where(receiver: str, http: str = "") -> str:
        return command.options("v", http, receiver, ("", ""), [], 1).receiver_http

    assert where("") == "http://127.0.0.1:7791"
    assert where("mac.local:9000") == "http://mac.local:7791"
    assert where("[fe80::1]:7790") == "http://[fe80::1]:7791"
    assert where("mac.local", "http://mac.local:1") == "http://mac.local:1"
    with pytest.raises(SettingsError):
        where("mac:port")
