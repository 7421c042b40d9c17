"""The servers that the tests ask, and one pytest process for a target and a group."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.conftest import free_port
from tests.servers import Receiver, Vllm, start_receiver, start_vllm
from tests.upstream.outcome import Outcome
from tests.upstream.selection import File
from tests.upstream.source import MODEL_NAME, plugin_folder

#: Longer than any test takes that passes, on two cores.
TEST_SECONDS = 100

_VLLM_OPTIONS = (
    *("--served-model-name", MODEL_NAME),
    *("--max-num-seqs", "128", "--seed", "0", "--enable-tokenizer-info-endpoint"),
    "--enable-scale-out",
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
)
_VLLM_ENVIRONMENT = {
    "VLLM_ENABLE_RESPONSES_API_STORE": "1",
    # As tests/entrypoints/openai/responses/conftest.py has it.
    "VLLM_SYSTEM_START_DATE": "2023-09-12",
}


class GateError(RuntimeError):
    """The tests could not be run; the text says why."""


@contextlib.contextmanager
def servers(model: Path, logs: Path, options: list[str]) -> Iterator[dict[str, str]]:
    """The three targets' URLs, with their servers running.

    Nothing is asked of them before the tests: some count a server's requests from its start.
    """
    with contextlib.ExitStack() as stack:

        def vllm(name: str, receiver: str | None) -> Vllm:
            server = start_vllm(
                model,
                logs / f"{name}.log",
                receiver=receiver,
                args=(*_VLLM_OPTIONS, *options),
                env=_VLLM_ENVIRONMENT,
                wait=False,
            )
            stack.callback(server.server.stop)
            return server

        port = free_port()
        plain, connector = vllm("plain", None), vllm("connector", f"127.0.0.1:{port}")
        receiver = start_receiver(
            model, logs / "receiver.log", port=port, args=("--served-model-name", MODEL_NAME)
        )
        stack.callback(receiver.server.stop)
        plain.wait_healthy()
        connector.wait_healthy()
        _wait_connected(receiver)
        yield {"plain": plain.url, "connector": connector.url, "receiver": receiver.url}


def _wait_connected(receiver: Receiver, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not receiver.health()["clients"]:
        if time.monotonic() > until:
            raise GateError(f"vLLM did not connect to the receiver: {receiver.server.tail()}")
        time.sleep(0.3)


def run(
    target: str,
    urls: dict[str, str],
    files: list[File],
    folder: Path,
    log: Path,
    report: Callable[[dict[str, Any]], None],
) -> dict[str, Outcome]:
    """Run the files' tests against a target, in a process of their own, and return each outcome.

    `folder` holds vLLM's tests and, in `cwd`, the model; pytest's own output goes to `log`.
    `report` gets each message of the plugin. Raises GateError when a file does not import, or the
    process ends before its tests.
    """
    ports = {name: url.rpartition(":")[2] for name, url in urls.items()}
    # P alone, D alone, and the pair; the receiver takes the pair's part for its own API.
    edges = {
        "plain": ("plain", "plain", "plain"),
        "connector": ("plain", "receiver", "connector"),
        "receiver": ("plain", "plain", "receiver"),
    }[target]
    environment = {
        "UPSTREAM_URL": urls[target],
        "UPSTREAM_MODEL": MODEL_NAME,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join((str(folder), str(plugin_folder()))),
        **dict(
            zip(
                ("PREFILL_PORT", "DECODE_PORT", "PROXY_PORT"),
                (ports[name] for name in edges),
                strict=True,
            )
        ),
    }
    command = [
        *(sys.executable, "-P", "-m", "pytest", "-q", "-p", "mac_decode_upstream"),
        *("-c", str(folder / "pyproject.toml"), "--rootdir", str(folder / "tests")),
        *("-p", "no:cacheprovider", f"--timeout={TEST_SECONDS}"),
    ]
    for file in files:
        command.append(str(folder / "tests" / file.path))
        command += (f"--deselect={file.path}::{test}" for test in file.left_out)
    outcomes: dict[str, Outcome] = {}
    broken: list[str] = []
    total = None
    reading, writing = os.pipe()
    with log.open("wb") as output, os.fdopen(reading) as messages:
        pytest = subprocess.Popen(
            command,
            cwd=folder / "cwd",
            env=os.environ | environment | {"UPSTREAM_REPORT": str(writing)},
            pass_fds=(writing,),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        os.close(writing)
        try:
            for line in messages:
                message = json.loads(line)
                report(message)
                match message:
                    case {"test": test, **rest}:
                        outcomes[test] = Outcome(**rest)
                    case {"total": total}:
                        pass
                    case {"broken": file, "message": reason}:
                        broken.append(f"{file}: {reason}")
        finally:
            pytest.terminate()
            pytest.wait()
    if broken or not outcomes or total != len(outcomes):
        reason = "; ".join(broken) or f"{len(outcomes)} of {total} tests ran"
        raise GateError(f"{target}: {reason}\n{log.read_text(errors='replace')[-3000:]}")
    return outcomes


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder for vLLM's tests, beside which the servers' logs stay until the end."""
    return tempfile.TemporaryDirectory(prefix="upstream-")
