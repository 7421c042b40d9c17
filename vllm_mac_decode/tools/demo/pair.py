"""Both halves as their users start them: `mlx-receiver start` and `vllm serve`."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from mlx_receiver.discovery.announce import Announcer
from mlx_receiver.discovery.browse import Browser
from mlx_receiver.discovery.service import Announced
from mlx_receiver.wire.messages import PROTOCOL_VERSION
from vllm_mac_decode.tools.bench.servers import Server
from vllm_mac_decode.tools.demo.services import Service, console_script, free_ports
from vllm_mac_decode.tools.timeline import TimelineError
from vllm_mac_decode.tools.timeline.fetch import fetch

#: Seconds within which both servers must be up.
START_SECONDS = 240.0
#: Seconds within which an announcement must be found.
_DISCOVERY_SECONDS = 3.0


class PairError(RuntimeError):
    """The two servers do not work together; the text says what was seen."""


@dataclass
class Pair:
    """A receiver and a vLLM server of the same model, connected to each other."""

    model_name: str
    vllm: Service
    vllm_url: str
    receiver: Service
    receiver_url: str
    # Everything is on this machine: a proxy of the environment must not see it.
    http: httpx.Client = field(default_factory=lambda: httpx.Client(trust_env=False, timeout=30))

    def receiver_metric(self, name: str) -> int:
        """The sum of a counter of the receiver over its labels."""
        return int(Server(self.receiver_url, "the receiver").metric(name))

    def vllm_version(self) -> str:
        """vLLM's version without the name of its build, e.g. "0.32.0"."""
        answer = self.http.get(f"{self.vllm_url}/version").raise_for_status().json()
        return str(answer["version"]).partition("+")[0]

    def handoff(self, response_id: str) -> bytes:
        """The receiver's account of a response, as JSON. Raises PairError if it has none."""
        try:
            return fetch(self.receiver_url, response_id)
        except TimelineError as error:
            raise PairError(f"{error} (what it never had, vLLM decoded itself)") from None

    def check(self) -> None:
        """Raise ServiceDied if one of the servers has ended."""
        self.receiver.check()
        self.vllm.check()

    def healthy(self, url: str) -> bool:
        """Whether the server at ``url`` says that it is ready."""
        try:
            return self.http.get(f"{url}/health", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    def connected(self) -> bool:
        """Whether vLLM is a client of the receiver."""
        return bool(self.http.get(f"{self.receiver_url}/health").json()["clients"])

    def stop(self) -> None:
        """End both servers."""
        self.http.close()
        self.vllm.stop()
        self.receiver.stop()


@contextmanager
def started(model: Path, max_model_len: int, out: Path, console: Console) -> Iterator[Pair]:
    """Both servers in float32, up and connected; stopped when the block is left.

    Logs go to ``out``. Raises ServiceDied or PairError when they do not come up.
    """
    control, receiver_http, vllm_http = free_ports(3)
    # Neither this user's other receivers nor another demo's are meant.
    shared = {"MAC_DECODE_TOKEN": secrets.token_hex(16)}
    if not _can_discover():
        console.print("[yellow]![/] no multicast on this machine: vLLM is told the address")
        shared["MAC_DECODE_RECEIVER"] = f"127.0.0.1:{control}"
    receiver = Service(
        "mlx-receiver",
        [
            *(console_script("mlx-receiver"), "start", "--model", str(model)),
            *("--dtype", "float32", "--host", "127.0.0.1"),
            *("--port", str(control), "--http-port", str(receiver_http)),
        ],
        out / "receiver.log",
        _environment() | shared,
    )
    try:
        vllm = Service(
            "vllm serve",
            [
                *(console_script("vllm"), "serve", str(model), "--served-model-name", model.name),
                *("--kv-connector", "mac_decode", "--dtype", "float32", "--enforce-eager"),
                *("--max-model-len", str(max_model_len)),
                *("--host", "127.0.0.1", "--port", str(vllm_http)),
            ],
            out / "vllm.log",
            _environment() | shared | _vllm_settings(),
        )
    except BaseException:
        receiver.stop()
        raise
    pair = Pair(
        model.name,
        vllm,
        f"http://127.0.0.1:{vllm_http}",
        receiver,
        f"http://127.0.0.1:{receiver_http}",
    )
    try:
        _wait(pair, console)
        yield pair
    finally:
        pair.stop()


def _environment() -> dict[str, str]:
    """This process's environment without what would change how the demo's servers behave."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MAC_DECODE_", "MLX_RECEIVER_")) and name != "VLLM_PLUGINS"
    }
    # The model is a folder here: nothing needs to be asked for, and nobody told.
    return environment | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "COLUMNS": "200"}


def _can_discover() -> bool:
    """Whether what is announced on this machine can be found on it."""
    instance = secrets.token_hex(8)
    told = Announced(protocol=PROTOCOL_VERSION, instance=instance, name="demo")
    until = time.monotonic() + _DISCOVERY_SECONDS
    with Browser() as browser, contextlib.closing(Announcer(told, 9, "127.0.0.1")):
        while (left := until - time.monotonic()) > 0:
            if any(found.announced.instance == instance for found in browser.found()):
                return True
            browser.wait(left)
    return False


def _vllm_settings() -> dict[str, str]:
    return {
        # Two engines share this machine's cores: slow is not stalled.
        "MAC_DECODE_STALL_TIMEOUT": "30",
        # vLLM alone would be faster here, but the hand-off is to be seen.
        "MAC_DECODE_OFFLOAD": "always",
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
    }


def _wait(pair: Pair, console: Console) -> None:
    began = time.monotonic()
    states = [
        _State(pair.receiver, pair.receiver_url, "mlx-receiver (decode)", began),
        _State(pair.vllm, pair.vllm_url, "vllm serve (prefill)", began),
    ]
    with Live(console=console, refresh_per_second=8, transient=True) as live:
        while True:
            for state in states:
                if not state.ready_after:
                    state.service.check()
                    if pair.healthy(state.url):
                        state.ready_after = time.monotonic() - began
                        live.console.print(f"[green]✓[/] {state.title}: {state.ready_after:.0f} s")
            if all(state.ready_after for state in states) and pair.connected():
                return
            if time.monotonic() - began > START_SECONDS:
                waits = [state.service for state in states if not state.ready_after]
                late = waits[0] if waits else pair.vllm
                problem = "did not get ready" if waits else "did not connect to the receiver"
                raise PairError(
                    f"{late.name} {problem} within {START_SECONDS:.0f} s. "
                    f"The end of {late.log}:\n{late.tail()}"
                )
            live.update(_progress(states))
            time.sleep(0.25)


@dataclass
class _State:
    service: Service
    url: str
    title: str
    began: float
    ready_after: float = 0.0
    spinner: Spinner = field(default_factory=lambda: Spinner("dots"))


def _progress(states: list[_State]) -> Table:
    """One line for each server that is not ready: for how long, and what it says it is doing."""
    table = Table.grid(padding=(0, 1))
    for _ in range(3):
        table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    table.expand = True
    for state in states:
        if not state.ready_after:
            seconds = f"{time.monotonic() - state.began:3.0f} s"
            said = Text(state.service.last_line(), style="dim")
            table.add_row(state.spinner, state.title, seconds, said)
    return table
