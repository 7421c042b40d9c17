"""All of ``mlx-receiver check``: its order, its end, its commands."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mlx_receiver import __version__
from mlx_receiver.checks import report
from mlx_receiver.checks.child import Begin, Facts, Found
from mlx_receiver.checks.finding import Finding
from mlx_receiver.checks.report import Report
from tests.mlx_receiver.checks.test_machine import RADIO, WIRED


def child(*lines: Any, then: str = "") -> tuple[str, ...]:
    """A child that says those lines and then does something."""
    text = b"".join(msgspec.json.encode(line) + b"\n" for line in lines)
    code = f"import os, sys\nsys.stdout.buffer.write({text!r})\nsys.stdout.flush()\n{then}"
    return (sys.executable, "-c", code)


def test_a_child_that_aborts_is_a_finding() -> None:
    fine = Finding("Metal", "fine", "yes")
    told = child(Found(fine), Begin("tokens"), then="os.abort()")
    made = Report(child=told)
    assert [*made._in_child()] == [
        fine,
        Finding("tokens", "wrong", "it ended the process with SIGABRT", report._REPORT_IT),
    ]
    made = Report(child=child(Begin("tokens"), then="sys.exit(3)"))
    (found,) = made._in_child()
    assert (found.name, found.seen) == ("tokens", "the process ended with status 3")


def test_a_child_that_hangs_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_SECONDS", (0.5, 0.5))
    told = child(Begin("tokens"), then="import time; time.sleep(60)")
    (found,) = Report(child=told)._in_child()
    assert (found.name, found.state, found.seen) == ("tokens", "wrong", "still not done after 0 s")


def test_the_commands_for_both_sides() -> None:
    made = Report(model="mlx-community/M-4bit", port=7000, child=child(Facts("org/M")))
    for _ in made.findings():
        pass
    made._found = [WIRED, RADIO]
    assert made.ready
    assert made.commands() == (
        "mlx-receiver start --model mlx-community/M-4bit --port 7000",
        [
            "mac-decode pair CODE",
            "mac-decode check --model org/M",
            "vllm serve org/M --kv-connector mac_decode",
        ],
    )
    assert json.loads(made.json())["there"] == made.commands()[1]


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mlx_receiver", "check", *options],
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip


@pytest.mark.server
def test_the_command_with_a_model(tiny_llama_path: Path) -> None:
    done = run("--model", str(tiny_llama_path), "--port", "0", "--http-port", "-1", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout)
    assert (said["version"], said["ready"]) == (__version__, True)
    states = {finding["name"]: finding["state"] for finding in said["findings"]}
    assert states["threads"] == states["recovery"] == states["model"] == "fine"
    # Nothing is claimed of a Mac that this is not.
    for name in ("architecture", "macOS", "Metal", "tokens", "model's tokens", "firewall", "sleep"):
        assert states[name] == "unchecked"
    assert states["loopback"] in ("fine", "warning")


@pytest.mark.server
def test_the_command_says_what_is_wrong_and_ends_with_1() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run("--model", "/no/such/folder", "--port", port)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"✗ port: {port} cannot be used" in done.stdout
    assert "✗ model: there is no folder /no/such/folder" in done.stdout
    assert done.stdout.splitlines()[-1] == "Not ready: port, model"
    # No log of ours between the lines of the report.
    assert "mlx_receiver" not in done.stderr and "connection" not in done.stderr


def test_options_that_cannot_be_used_end_it_with_2() -> None:
    for options in (["--port", "99999"], ["--nonsense"]):
        assert run(*options).returncode == 2
