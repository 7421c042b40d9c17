"""The ``mac-decode`` command against a real receiver."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from mlx_receiver.wire.sampling import Sampling
from tests.conftest import free_port
from vllm_mac_decode.tools.timeline import TimelineError
from vllm_mac_decode.tools.timeline.fetch import fetch

pytest.importorskip("mlx.core")

from mlx_receiver.receiver import Receiver
from tests.mlx_receiver.client import FakeVllm, Prefilled, connected

COMMAND = Path(sys.executable).with_name("mac-decode")


def mac_decode(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command's result in an environment without settings of its own."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MAC_DECODE_", "VLLM_"))}
    return subprocess.run(
        [str(COMMAND), *map(str, arguments)],
        env=plain | {"COLUMNS": "200", "HF_HUB_OFFLINE": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture(scope="module")
def handed_off(real: Receiver) -> str:
    """The id of a request whose KV the receiver got and continued; not the latest one."""
    with connected(real, token="secret") as client:
        wanted, _ = [hand_off(client) for _ in range(2)]
    return wanted


def hand_off(client: FakeVllm) -> str:
    layers = client.receiver.source.layout.layers
    shape = (layers[0].parts[0].heads, 9, layers[0].parts[0].width)
    values = np.random.default_rng(0).standard_normal(shape, np.float32).view(np.uint32)
    kv = Prefilled([7] * 9, [[values, values]] * len(layers), "float32", [11])
    session = client.request(kv, Sampling(max_tokens=3, temperature=0.0))
    assert len(client.tokens(session)) == 2
    return f"request-{session}"


def http(real: Receiver) -> str:
    assert real.http is not None
    return f"http://127.0.0.1:{real.http.port}"


# --- help ---------------------------------------------------------------------------------------


def test_help_names_every_command() -> None:
    done = mac_decode("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("demo", "trace", "check", "bench", "--version"))


def test_help_of_a_command_loads_nothing_heavy() -> None:
    program = (
        "import sys; from vllm_mac_decode.tools.cli import app\n"
        "try: app(['demo', '--help'])\n"
        "except SystemExit: pass\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.splitlines()[-1].split())
    assert not loaded & {"vllm", "torch", "mlx", "numpy", "openai", "matplotlib", "zmq", "httpx"}


def test_version() -> None:
    assert mac_decode("--version").stdout.strip() == (
        f"mac-decode {metadata.version('vllm-mac-decode')}"
    )


# --- check: what it finds is in check/ -----------------------------------------------------------


def test_check_of_a_machine_that_is_ready(real: Receiver) -> None:
    done = mac_decode("check", "--receiver", real.address, "--token", "secret")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("✓") >= 4
    assert "✗" not in done.stdout
    ready, command = done.stdout.splitlines()[-2:]
    assert ready == "Ready. Start vLLM with:"
    assert f"--kv-connector mac_decode --mac-decode-receiver {real.address}" in command
    assert "secret" not in done.stdout


def test_check_takes_receiver_and_token_of_the_environment_and_tells_programs(
    real: Receiver,
) -> None:
    environment = {"MAC_DECODE_RECEIVER": real.address, "MAC_DECODE_TOKEN": "guess"}
    done = mac_decode("check", "--json", **environment)
    assert done.returncode == 1, done.stdout
    report = json.loads(done.stdout)
    assert not report["ready"]
    (bad,) = [finding for finding in report["findings"] if finding["state"] == "wrong"]
    assert bad["name"] == "token"
    assert bad["seen"].startswith("The token is wrong")
    assert bad["remedy"]
    assert "guess" not in done.stdout


def test_check_of_an_address_that_is_none() -> None:
    done = mac_decode("check", "--receiver", "mac:port")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "receiver must be host:port, not 'mac:port'" in done.stderr


def test_check_when_nothing_listens() -> None:
    done = mac_decode("check", "--receiver", f"127.0.0.1:{free_port()}")
    assert done.returncode == 1
    assert "→ On the Mac: mlx-receiver start" in done.stdout
    assert done.stdout.splitlines()[-1] == "Not ready."


# --- trace --------------------------------------------------------------------------------------


def test_trace_of_one_request_with_its_picture(
    real: Receiver, handed_off: str, tmp_path: Path
) -> None:
    out, picture = tmp_path / "trace.json", tmp_path / "trace.svg"
    done = mac_decode(
        *("trace", "--receiver-http", http(real), "--request", handed_off),
        *("--out", out, "--svg", picture),
    )
    assert done.returncode == 0, done.stderr
    trace = json.loads(out.read_text())
    assert trace["otherData"]["request_id"] == handed_off
    assert trace["otherData"]["prompt_tokens"] == 9
    assert sum(event["ph"] == "X" for event in trace["traceEvents"]) >= 3 * 8
    assert "9 prompt tokens, 4 layers" in picture.read_text()
    assert done.stdout.count("●") == 4 + 2
    assert str(picture) in done.stdout


def test_trace_takes_the_latest_request(real: Receiver, handed_off: str, tmp_path: Path) -> None:
    out = tmp_path / "trace.json"
    done = mac_decode("trace", "--receiver-http", http(real), "--out", out)
    assert done.returncode == 0, done.stderr
    latest = json.loads(out.read_text())["otherData"]["request_id"]
    assert int(latest.removeprefix("request-")) == int(handed_off.removeprefix("request-")) + 1


def test_trace_as_the_readme_writes_it_shows_and_writes_nothing(
    real: Receiver, handed_off: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = mac_decode("trace", "--receiver-http", http(real))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("●") == 4 + 2
    assert "Written" not in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_trace_of_a_receiver_with_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    class Locked(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.headers.get("Authorization") == "Bearer k"
            self.send_response(200 if known else 401)
            self.end_headers()
            self.wfile.write(b"[]")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Locked) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(TimelineError, match="wants a key: --api-key or MLX_RECEIVER_API_KEY"):
            fetch(url)
        # A proxy for the rest of the world has no business with it.
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
        with pytest.raises(TimelineError, match="remembers no hand-off"):
            fetch(url, api_key="k")
        server.shutdown()


def test_trace_of_an_unknown_request_lists_the_known_ones(
    real: Receiver, handed_off: str, tmp_path: Path
) -> None:
    out = tmp_path / "trace.json"
    done = mac_decode(
        "trace", "--receiver-http", http(real), "--request", "chatcmpl-1", "--out", out
    )
    assert done.returncode == 1
    assert "does not remember chatcmpl-1" in done.stderr
    assert handed_off in done.stderr
    assert not out.exists()


def test_trace_without_a_receiver(tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    done = mac_decode("trace", "--receiver-http", address, "--out", tmp_path / "trace.json")
    assert done.returncode == 1
    assert f"no receiver answers at {address}" in done.stderr
    assert "Traceback" not in done.stderr


# --- demo ---------------------------------------------------------------------------------------


def test_demo_of_a_folder_without_a_model(tmp_path: Path) -> None:
    done = mac_decode("demo", "--model", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 1
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["ok"] is False
    assert "has no config.json" in result["error"]
    assert "Traceback" not in done.stderr
