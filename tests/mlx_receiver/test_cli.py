"""The ``mlx-receiver`` command: what it says, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from mlx_receiver.cli import app
from mlx_receiver.settings import SettingsError, is_loopback, parse_bytes
from tests.mlx_receiver.conftest import Prefill


@pytest.fixture(autouse=True)
def _keep_signal_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.output


def test_version() -> None:
    code, text = run("--version")
    assert code == 0
    assert re.fullmatch(r"mlx-receiver \d+\.\d+\.\d+\n", text)


def test_help_imports_no_mlx() -> None:
    script = (
        "import sys, typer.testing, mlx_receiver.cli as c;"
        "r = typer.testing.CliRunner().invoke(c.app, ['start', '--help']);"
        "assert r.exit_code == 0 and '--kv-memory' in r.output, r.output;"
        "bad = {'mlx', 'mlx_lm', 'torch', 'vllm', 'zmq', 'numpy', 'uvicorn'} & set(sys.modules);"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env={"COLUMNS": "200"} | _env())


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--port", "99999"], "--port 99999 is no port"),
        (["--port", "-1"], "--port -1 is no port"),
        (["--data-port", "70000"], "--data-port 70000 is no port"),
        (["--http-port", "99999"], "--http-port 99999 is no port"),
        (["--data-port", "65535", "--transport", "tcp,zmq"], "transports 65536 is no port"),
        (["--host", "nonsense.invalid"], "--host nonsense.invalid cannot be listened on"),
        (["--host", "203.0.113.9"], "Cannot assign requested address): 0.0.0.0 is every address"),
    ],
)
def test_ports_and_hosts_that_cannot_be(options: list[str], names: str) -> None:
    code, text = run("start", "--model", "any", "--token", "t", "--api-key", "k", *options)
    assert code == 2
    assert len(text.splitlines()) == 1
    assert names in text


@pytest.mark.parametrize("option", ["--port", "--data-port", "--http-port"])
def test_a_port_in_use_is_named(tiny_llama_path: Path, option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = str(taken.getsockname()[1])
        ports = {"--port": "0", "--data-port": "0", "--http-port": "-1", option: number}
        ports |= {"--host": "127.0.0.1"}
        options = [part for pair in ports.items() for part in pair]
        code, text = run("start", "--model", str(tiny_llama_path), *options)
    assert code == 2
    assert len(text.splitlines()) == 1
    assert f"127.0.0.1:{number} cannot be used (Address already in use)" in text
    assert f"another with {option}" in text


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (None, "no config.json"),
        ("not json", "cannot be read"),
        ('{"model_type": "llama"}', "no usable"),
        (
            '{"model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 2,'
            ' "hidden_size": 64, "vocab_size": 99, "intermediate_size": 64,'
            ' "rms_norm_eps": 1e-5}',
            "No safetensors found",
        ),
    ],
)
def test_models_that_cannot_be_served(tmp_path: Path, config: str | None, names: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    options = ["--port", "0", "--http-port", "-1"]
    code, text = run("start", "--model", str(tmp_path), *options)
    assert code == 2
    assert names in text
    assert "Traceback" not in text


@pytest.mark.parametrize("folder", ["/no/such/folder", "~nobody-of-that-name/model"])
@pytest.mark.parametrize("command", ["start", "profile"])
def test_a_missing_folder_is_named(command: str, folder: str) -> None:
    code, text = run(command, "--model", folder)
    assert code == 2
    assert f"there is no folder {folder}" in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("option", "value"), [("--dtype", "int8"), ("--kv-memory", "lots"), ("--log-level", "loud")]
)
def test_unusable_options_are_named(option: str, value: str) -> None:
    code, text = run("start", "--model", "any", option, value)
    assert code == 2
    assert value in text


def test_generate_is_mlx_alone(tiny_llama_path: Path, prefill: Prefill) -> None:
    kv = prefill(17)
    code, text = run(
        "generate",
        *("--model", str(tiny_llama_path)),
        *("--token-ids", ",".join(map(str, kv.prompt)), "--max-tokens", "8", "--json"),
    )
    assert code == 0, text
    answer = json.loads(text)
    assert answer["token_ids"] == kv.tokens
    assert answer["dtype"] == "float32"


@pytest.mark.server
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_started_receiver_serves_and_stops_on_a_signal(
    tiny_llama_path: Path, number: signal.Signals
) -> None:
    command = [sys.executable, "-m", "mlx_receiver", "start", "--model", str(tiny_llama_path)]
    ports = ["--port", "0", "--http-port", "0", "--host", "127.0.0.1", "--no-discovery"]
    process = subprocess.Popen(
        [*command, *ports], stderr=subprocess.PIPE, text=True, env=_env(MLX_RECEIVER_MAX_BATCH="3")
    )
    assert process.stderr is not None
    try:
        said = ""
        while "For another one:" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        assert "3 of them decoding" in said
        assert re.search(r"MAC_DECODE_RECEIVER=127.0.0.1:\d+", said)
        # On this machine vLLM finds the model where it is.
        assert f"vllm serve {tiny_llama_path} --kv-connector mac_decode\n" in said
        assert said.splitlines()[-1].endswith("leave --host 127.0.0.1 out")
        found = re.search(r"http://\S+/health", said)
        assert found
        answer = httpx.get(found.group(0))
        assert (answer.status_code, answer.json()["status"]) == (200, "ok")
        began = time.monotonic()
        process.send_signal(number)
        assert process.wait(timeout=10) == 0
        assert time.monotonic() - began < 2
    finally:
        process.kill()
        process.stderr.close()


def test_an_error_beside_a_running_engine_keeps_its_exit_status(tiny_llama_path: Path) -> None:
    """MLX's static destructors would abort the process, at every fourth try or so."""
    command = [sys.executable, "-m", "mlx_receiver.cli", "generate", "--model",
               str(tiny_llama_path), "--token-ids", "99999999"]  # fmt: skip
    for _ in range(6):
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert ended.returncode == 2, ended.stderr
        assert ended.stderr.splitlines()[-1].endswith("outside the vocabulary of 49152")


def test_amounts_of_memory() -> None:
    assert parse_bytes("24GB") == 24 << 30
    assert parse_bytes("512 MiB") == 512 << 20
    assert parse_bytes("1.5g") == 3 << 29
    assert parse_bytes("1000") == 1000
    for text in ("", "GB", "1.2.3k", "-"):
        with pytest.raises(SettingsError):
            parse_bytes(text)


def test_loopback_addresses() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "10.0.0.1", "::", "spark.local", "")))


def _env(**more: str) -> dict[str, str]:
    return {**os.environ, **more}
