"""The ``mac-decode`` command against a real receiver."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from mlx_receiver.wire.messages import PROTOCOL_VERSION, Sampling
from tests.conftest import free_port
from vllm_mac_decode import check

pytest.importorskip("mlx.core")

from mlx_receiver.receiver import Receiver
from mlx_receiver.settings import Settings
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
def receiver(tiny_llama_path: Path) -> Iterator[Receiver]:
    settings = Settings(
        model=str(tiny_llama_path), port=0, http_port=0, kv_memory=1 << 28, token="secret"
    )
    with Receiver(settings) as started:
        yield started


@pytest.fixture(scope="module")
def handed_off(receiver: Receiver) -> str:
    """The id of a request whose KV the receiver got and continued; not the latest one."""
    with connected(receiver, token="secret") as client:
        wanted, _ = [hand_off(client) for _ in range(2)]
    return wanted


def hand_off(client: FakeVllm) -> str:
    signature = client.receiver.source.signature
    shape = (signature.kv_heads, 9, signature.head_dim)
    values = np.random.default_rng(0).standard_normal(shape, np.float32).view(np.uint32)
    kv = Prefilled([7] * 9, [[values, values]] * signature.layers, "float32", [11])
    session = client.request(kv, Sampling(max_tokens=3, temperature=0.0))
    assert len(client.tokens(session)) == 2
    return f"request-{session}"


def http(receiver: Receiver) -> str:
    assert receiver.http is not None
    return f"http://127.0.0.1:{receiver.http.port}"


# --- help ---------------------------------------------------------------------------------------


def test_help_names_every_command() -> None:
    done = mac_decode("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("demo", "trace", "check", "--version"))


def test_help_of_a_command_loads_nothing_heavy() -> None:
    program = (
        "import sys; from vllm_mac_decode.cli import app\n"
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


# --- check --------------------------------------------------------------------------------------


def test_check_of_a_machine_that_is_ready(receiver: Receiver, tiny_llama_path: Path) -> None:
    arguments = ("check", "--receiver", receiver.address, "--model", tiny_llama_path)
    done = mac_decode(*arguments, MAC_DECODE_TOKEN="secret")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("✓") == 5
    assert "✗" not in done.stdout
    assert f"Wire protocol {PROTOCOL_VERSION}" in done.stdout
    assert f"mlx {metadata.version('mlx')}" in done.stdout
    assert done.stdout.splitlines()[-1] == "Ready."


def test_check_takes_the_receiver_of_the_environment(receiver: Receiver) -> None:
    done = mac_decode("check", MAC_DECODE_RECEIVER=receiver.address)
    assert done.returncode == 0, done.stdout
    assert receiver.address in done.stdout


def test_check_names_a_wrong_token(receiver: Receiver, tiny_llama_path: Path) -> None:
    arguments = ("check", "--receiver", receiver.address, "--model", tiny_llama_path)
    done = mac_decode(*arguments, MAC_DECODE_TOKEN="guess")
    assert done.returncode == 1
    assert "wrong or missing token" in done.stdout
    assert "→ export MAC_DECODE_TOKEN" in done.stdout
    assert "secret" not in done.stdout
    assert "guess" not in done.stdout


def test_check_names_what_differs_between_two_models(
    receiver: Receiver, tiny_qwen3_path: Path
) -> None:
    arguments = ("check", "--receiver", receiver.address, "--model", tiny_qwen3_path)
    done = mac_decode(*arguments, MAC_DECODE_TOKEN="secret")
    assert done.returncode == 1
    assert "layers: 4 here, 3 there" in done.stdout
    assert "→ Start both sides with the same --model" in done.stdout


def test_check_when_nothing_listens() -> None:
    port = free_port()
    done = mac_decode("check", "--receiver", f"127.0.0.1:{port}")
    assert done.returncode == 1
    assert f"✗ Nothing listens at 127.0.0.1:{port} (Connection refused)" in done.stdout
    assert "→ On the Mac: mlx-receiver start" in done.stdout
    assert done.stdout.splitlines()[-1] == "Not ready."


def test_check_of_a_port_that_is_not_the_control_port(
    receiver: Receiver, tiny_llama_path: Path
) -> None:
    address = http(receiver).removeprefix("http://")
    done = mac_decode("check", "--receiver", address, "--model", tiny_llama_path)
    assert done.returncode == 1
    assert "answers nothing" in done.stdout
    assert "control port" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--receiver", "somewhere"], "receiver must be host:port, not 'somewhere'"),
        (["--receiver", "no-such-host.invalid:7790"], "no-such-host.invalid has no address"),
        (["--model", "/no/such/folder"], "/no/such/folder cannot be read"),
    ],
)
def test_check_of_what_was_mistyped(arguments: list[str], complaint: str) -> None:
    done = mac_decode("check", *arguments)
    assert done.returncode == 1
    assert complaint in done.stdout
    assert "Traceback" not in done.stderr


def test_check_notices_that_vllm_may_not_load_the_plugin() -> None:
    done = mac_decode("check", VLLM_PLUGINS="lora_filesystem_resolver")
    assert done.returncode == 1
    assert "→ export VLLM_PLUGINS=lora_filesystem_resolver,mac_decode" in done.stdout


@pytest.mark.parametrize(
    ("version", "supported"),
    [("0.25.1", False), ("0.26.0", True), ("0.33.2+cu130", True), ("0.34.0rc1", False)],
)
def test_which_releases_of_vllm_are_supported(
    version: str, supported: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / f"vllm-{version}.dist-info"
    record.mkdir()
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)
    finding = check.check_vllm()
    assert (finding.ok, version in finding.text) == (supported, True)
    assert finding.remedy == ("" if supported else "pip install 'vllm>=0.26,<0.34'")


# --- trace --------------------------------------------------------------------------------------


def test_trace_of_one_request_with_its_picture(
    receiver: Receiver, handed_off: str, tmp_path: Path
) -> None:
    out, picture = tmp_path / "trace.json", tmp_path / "trace.svg"
    done = mac_decode(
        *("trace", "--receiver-http", http(receiver), "--request", handed_off),
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


def test_trace_takes_the_latest_request(
    receiver: Receiver, handed_off: str, tmp_path: Path
) -> None:
    out = tmp_path / "trace.json"
    done = mac_decode("trace", "--receiver-http", http(receiver), "--out", out)
    assert done.returncode == 0, done.stderr
    latest = json.loads(out.read_text())["otherData"]["request_id"]
    assert int(latest.removeprefix("request-")) == int(handed_off.removeprefix("request-")) + 1


def test_trace_of_an_unknown_request_lists_the_known_ones(
    receiver: Receiver, handed_off: str, tmp_path: Path
) -> None:
    out = tmp_path / "trace.json"
    done = mac_decode(
        "trace", "--receiver-http", http(receiver), "--request", "chatcmpl-1", "--out", out
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
