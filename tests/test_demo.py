"""`mac-decode demo` as its users run it: both servers, one request, every number checked."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest

from tests.waiting import eventually
from vllm_mac_decode.tools.demo.run import Options, run

pytest.importorskip("mlx.core")
pytest.importorskip("vllm")

pytestmark = pytest.mark.server
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

COMMAND = Path(sys.executable).with_name("mac-decode")


class Demo:
    """A running demo and, by their sessions, all processes that its servers start."""

    def __init__(self, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [str(COMMAND), "demo", *map(str, arguments)],
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._sessions: set[int] = set()

    def servers(self) -> list[str]:
        """Names of the processes that the demo has started, seen now or before, and still run."""
        running = []
        for file in Path("/proc").glob("[0-9]*/stat"):
            try:
                name, _, fields = file.read_text().partition("(")[2].rpartition(")")
            except OSError:
                continue
            state, parent, _, session = fields.split()[:4]
            if int(parent) == self.process.pid and int(session) != os.getsid(0):
                self._sessions.add(int(session))
            if state != "Z":
                running.append((name, int(session)))
        return [name for name, session in running if session in self._sessions]

    def finish(self, seconds: float) -> tuple[int, dict[str, object], list[str]]:
        """The exit status, the JSON object, and the other lines."""
        output, _ = self.process.communicate(timeout=seconds)
        *lines, last = output.splitlines()
        return self.process.returncode, json.loads(last), lines


@pytest.fixture
def start() -> Iterator[Callable[..., Demo]]:
    demos: list[Demo] = []
    # Where the tests run in the background, SIGINT is ignored, and children inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def started(*arguments: object) -> Demo:
        demos.append(Demo(*arguments))
        return demos[-1]

    yield started
    signal.signal(signal.SIGINT, before)
    for demo in demos:
        demo.process.terminate()
        demo.process.wait(60)


def test_what_is_missing_is_named_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "openai" else found(name)
    )
    assert run(Options(out=tmp_path / "out")) == 1
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["error"].startswith("the demo needs openai: `make demo`")
    assert not (tmp_path / "out").exists()


def log_says(log: Path, text: str) -> bool:
    return log.exists() and text in log.read_text(errors="replace")


@linux
@pytest.mark.slow
def test_the_demo_hands_off_a_request_and_proves_it(
    start: Callable[..., Demo], tiny_llama_path: Path, tmp_path: Path
) -> None:
    demo = start("--model", tiny_llama_path, "--max-tokens", 12, "--out", tmp_path)
    assert eventually(lambda: len(demo.servers()) >= 6, 120, 0.2)
    status, result, lines = demo.finish(300)
    assert status == 0, result
    prompt_tokens, gap = result["prompt_tokens"], result["handoff_gap_ms"]
    assert isinstance(prompt_tokens, int)
    assert isinstance(gap, float)
    assert prompt_tokens > 200
    assert gap > 0
    vllm = metadata.version("vllm").partition("+")[0]
    assert result == {
        "ok": True,
        "model": tiny_llama_path.name,
        "prefill_engine": f"vllm {vllm}",
        "decode_engine": f"mlx {metadata.version('mlx')}",
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 12,
        "decoded_by_receiver": 11,
        "kv_bytes": 4 * 2 * 2 * 32 * 4 * prompt_tokens,
        "layers": 4,
        "handoff_gap_ms": gap,
        "parity": {"mode": "greedy-fp32", "tokens_compared": 12, "equal": True},
    }
    assert sum(line.count("●") for line in lines if line.lstrip().startswith("layer")) == 4
    assert (tmp_path / "handoff.png").read_bytes().startswith(b"\x89PNG")
    assert "layer 3" in (tmp_path / "handoff.svg").read_text()
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert demo.servers() == []


@linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_both_servers(
    start: Callable[..., Demo], tiny_llama_path: Path, tmp_path: Path, number: signal.Signals
) -> None:
    demo = start("--model", tiny_llama_path, "--out", tmp_path)
    assert eventually(lambda: log_says(tmp_path / "receiver.log", "Listening"), 60, 0.2)
    assert len(demo.servers()) >= 4
    demo.process.send_signal(number)
    status, result, _ = demo.finish(60)
    assert status == 130
    assert (result["ok"], result["error"]) == (False, "interrupted")
    assert demo.servers() == []


@linux
@pytest.mark.slow
def test_a_killed_demo_leaves_nothing_behind(
    start: Callable[..., Demo], tiny_llama_path: Path, tmp_path: Path
) -> None:
    demo = start("--model", tiny_llama_path, "--out", tmp_path)
    assert eventually(lambda: log_says(tmp_path / "vllm.log", "Starting to load model"), 120, 0.2)
    # The receiver and its guard; vLLM's server, engine and worker, and theirs.
    assert len(demo.servers()) >= 6
    demo.process.kill()
    demo.process.wait(10)
    assert eventually(lambda: demo.servers() == [], 60, 0.2), demo.servers()


@linux
def test_a_server_that_dies_ends_the_demo_with_its_last_words(
    start: Callable[..., Demo], tiny_llama_path: Path, tmp_path: Path
) -> None:
    model = tmp_path / "without-weights"
    shutil.copytree(tiny_llama_path, model, ignore=shutil.ignore_patterns("*.safetensors"))
    demo = start("--model", model, "--out", tmp_path / "out")
    assert eventually(lambda: len(demo.servers()) >= 4, 30, 0.2)
    status, result, _ = demo.finish(120)
    assert status == 1
    assert result["ok"] is False
    error = str(result["error"])
    assert error.startswith(("mlx-receiver ended with status", "vllm serve ended with status"))
    assert "safetensors" in error
    assert demo.servers() == []
