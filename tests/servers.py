"""Real servers for tests: ``vllm serve`` and ``mlx-receiver start`` as their users start them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import httpx

from tests.conftest import free_port
from tests.warm import RECEIVER, VLLM, Forked, forker, possible

BIN = Path(sys.executable).parent
START_SECONDS = 240.0


class Server:
    """A server in its own process group, with its output in a file."""

    #: Those of this run, the oldest first.
    started: ClassVar[list[Server]] = []

    def __init__(
        self,
        command: list[str],
        log: Path,
        env: dict[str, str] | None = None,
        imported: tuple[str, ...] = (),
        inside: tuple[str, ...] = (),
    ) -> None:
        """``imported`` is what it need not import itself if it is a Python script, see
        ``tests.warm``; ``inside`` precedes the command, such as ``ip netns exec NAME``."""
        self.log = log
        environment = os.environ | {"HF_HUB_OFFLINE": "1"} | (env or {})
        self.process: subprocess.Popen[bytes] | Forked
        *how, network = inside or ("",)
        if imported and possible() and how in ([], ["ip", "netns", "exec"]):
            self.process = forker(imported).start(command, log, environment, network)
        else:
            with log.open("wb") as output:
                self.process = subprocess.Popen(
                    [*inside, *command],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
        self.started.append(self)

    def wait_healthy(self, url: str, seconds: float = START_SECONDS) -> None:
        """Wait for ``GET url`` to answer 200; fails with the log's end if the process dies."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise AssertionError(f"exit {self.process.returncode}: {self.tail()}")
            with contextlib.suppress(urllib.error.URLError, OSError):
                with urllib.request.urlopen(url, timeout=2) as response:
                    if response.status == 200:
                        return
            time.sleep(0.2)
        raise AssertionError(f"{url} did not answer within {seconds:.0f} s: {self.tail()}")

    def tail(self, count: int = 4000) -> str:
        """The end of the output."""
        return self.log.read_text(errors="replace")[-count:]

    def signal(self, number: int) -> None:
        """Signal the whole process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def stop(self) -> None:
        """End it, firmly if need be."""
        if self.process.poll() is None:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=15)
        self.signal(signal.SIGKILL)
        self.process.wait(timeout=15)


@dataclass
class Receiver:
    """A running ``mlx-receiver``."""

    server: Server
    port: int
    http_port: int
    host: str = "127.0.0.1"
    key: str = ""

    @property
    def address(self) -> str:
        """Its control address."""
        return f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """The base URL of its HTTP API."""
        return f"http://{self.host}:{self.http_port}"

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        return metric(self.url, name, self.key)

    def health(self) -> dict[str, Any]:
        """``GET /health``."""
        return httpx.get(f"{self.url}/health", headers=_bearer(self.key)).json()

    def assert_idle(self, seconds: float = 10) -> None:
        """It holds nothing, at the latest then: a response is complete a moment before that."""
        until = time.monotonic() + seconds
        while (held := self._held()) and time.monotonic() < until:
            time.sleep(0.05)
        assert not held, held

    def _held(self) -> dict[str, int]:
        health = self.health()
        names = ("sessions", "decoding", "waiting", "kv_reserved_bytes")
        return {name: health[name] for name in names if health[name]}


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def metric(base: str, name: str, key: str = "", /, **labels: str) -> float:
    """The sum of a Prometheus metric's samples that carry these labels."""
    total = 0.0
    answer = httpx.get(f"{base}/metrics", timeout=30, headers=_bearer(key))
    assert answer.status_code == 200, answer.text
    for line in answer.text.splitlines():
        if line.startswith((f"{name} ", f"{name}{{")) and all(
            f'{key}="{value}"' in line for key, value in labels.items()
        ):
            total += float(line.rsplit(" ", 1)[1])
    return total


def start_receiver(
    model: Path,
    log: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    http_port: int = 0,
    args: tuple[str, ...] = (),
    inside: tuple[str, ...] = (),
    key: str = "",
    fresh: bool = False,
) -> Receiver:
    """Start a receiver in fp32 and wait until it is ready; ``inside`` precedes its command, ``key``
    is its API key, if it has one, and ``fresh`` is as for ``start_vllm``."""
    port, http_port = port or free_port(), http_port or free_port()
    command = [
        str(BIN / "mlx-receiver"), "start", "--model", str(model), "--dtype", "float32",
        "--host", host, "--port", str(port), "--http-port", str(http_port), "--no-discovery",
        *args,
    ]  # fmt: skip
    if key:
        command += ["--api-key", key]
    imported = () if fresh else RECEIVER
    server = Server(command, log, imported=imported, inside=inside)
    receiver = Receiver(server, port, http_port, host, key)
    try:
        receiver.server.wait_healthy(f"{receiver.url}/health", 120)
    except BaseException:
        receiver.server.stop()
        raise
    return receiver


@dataclass
class Vllm:
    """A running ``vllm serve``; ``name`` is the served model's."""

    server: Server
    port: int
    name: str = "m"

    @property
    def url(self) -> str:
        """Its base URL."""
        return f"http://127.0.0.1:{self.port}"

    def complete(
        self, prompt: list[int] | list[list[int]] | str, max_tokens: int, **fields: Any
    ) -> dict[str, Any]:
        """``POST /v1/completions``, greedy unless said otherwise, with token ids."""
        body = {
            "model": self.name,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "return_token_ids": True,
        } | fields
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=300)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def tokens(self, prompt: list[int], max_tokens: int, **fields: Any) -> list[int]:
        """The output token ids of a greedy completion that runs to its limit."""
        fields = {"ignore_eos": True} | fields
        return self.complete(prompt, max_tokens, **fields)["choices"][0]["token_ids"]

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric over its labels."""
        return metric(self.url, name, **labels)

    def wait_healthy(self) -> None:
        """Wait until it serves."""
        self.server.wait_healthy(f"{self.url}/health")

    def wait_connected(self, receiver: Receiver, seconds: float = 20.0, **fields: Any) -> None:
        """Wait until hand-offs work, by making some, of requests with those fields."""
        until = time.monotonic() + seconds
        before = receiver.metric("mlx_receiver_decoded_tokens_total")
        while time.monotonic() < until:
            self.tokens([1, 2, 3], 3, **fields)
            if receiver.metric("mlx_receiver_decoded_tokens_total") > before:
                return
            time.sleep(0.3)
        raise AssertionError(f"no hand-off within {seconds} s: {self.server.tail()}")


def start_vllm(
    model: Path,
    log: Path,
    *,
    receiver: str | None = None,
    args: tuple[str, ...] = (),
    env: dict[str, str] | None = None,
    wait: bool = True,
    fresh: bool = False,
) -> Vllm:
    """Start ``vllm serve`` in fp32, with the connector if a receiver's address is given. One that
    is ``fresh`` imports everything itself, three times, as it does for its users."""
    port = free_port()
    connector = ["--kv-connector", "mac_decode"] if receiver is not None else []
    command = [
        str(BIN / "vllm"), "serve", str(model), "--dtype", "float32", "--port", str(port),
        "--served-model-name", "m", "--enforce-eager", "--max-model-len", "2048",
        *connector, *args,
    ]  # fmt: skip
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "MAC_DECODE_RECEIVER": receiver or "",
        # What is not about stalls must not depend on how busy the machine is.
        "MAC_DECODE_STALL_TIMEOUT": "20",
    }
    imported = () if fresh else VLLM
    server = Server(command, log, environment | (env or {}), imported)
    vllm = Vllm(server, port)
    if wait:
        try:
            vllm.wait_healthy()
        except BaseException:
            server.stop()
            raise
    return vllm


@contextlib.contextmanager
def pair(
    model: Path,
    logs: Path,
    *,
    args: tuple[str, ...] = (),
    receiver_args: tuple[str, ...] = (),
    env: dict[str, str] | None = None,
    front_door: bool = False,
    fresh: bool = False,
) -> Iterator[tuple[Vllm, Receiver]]:
    """Both servers for one model, connected; with ``front_door`` vLLM prefills for the receiver;
    ``fresh`` is as for ``start_vllm``."""
    port = free_port()
    # Both start at once: the connector waits for its receiver.
    vllm = start_vllm(
        model,
        logs / "vllm.log",
        receiver=f"127.0.0.1:{port}",
        args=args,
        env=env,
        wait=False,
        fresh=fresh,
    )
    if front_door:
        receiver_args += ("--prefill", vllm.url)
    try:
        receiver = start_receiver(
            model, logs / "receiver.log", port=port, args=receiver_args, fresh=fresh
        )
        try:
            vllm.wait_healthy()
            vllm.wait_connected(receiver)
            yield vllm, receiver
        finally:
            receiver.server.stop()
    finally:
        vllm.server.stop()
