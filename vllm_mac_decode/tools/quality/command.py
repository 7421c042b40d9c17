"""``mac-decode check --quality``: progress, the table, and the verdict."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from mlx_receiver.settings import DEFAULT_HTTP_PORT
from mlx_receiver.wire import addresses
from vllm_mac_decode.settings import load
from vllm_mac_decode.tools.bench.servers import BenchError
from vllm_mac_decode.tools.check.finding import show as show_finding
from vllm_mac_decode.tools.quality import show, texts
from vllm_mac_decode.tools.quality.measure import Options, measure

__all__ = ["BenchError", "options", "run"]


def options(
    vllm: str,
    receiver_http: str,
    receiver: str,
    api_keys: tuple[str, str],
    files: list[Path],
    seconds: float,
) -> Options:
    """What the command line says; ``api_keys`` are vLLM's and the receiver's.

    Raises ValueError and SettingsError naming what is wrong.
    """
    if not receiver_http:
        hosts = [host for host, _ in load({"receiver": receiver}).addresses().values()]
        host = hosts[0] if hosts else "127.0.0.1"
        receiver_http = f"http://{addresses.spelled(host, DEFAULT_HTTP_PORT)}"
    chosen = Options(vllm, receiver_http, *api_keys, seconds=seconds)
    return replace(chosen, texts=texts.read(files)) if files else chosen


def run(chosen: Options, as_json: bool) -> int:
    """The exit status: 1 when handing off costs more than it may. Raises BenchError."""
    screen = Console(stderr=True)
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(
        *columns, console=screen, transient=True, disable=not screen.is_terminal
    ) as progress:
        task = progress.add_task("", total=1.0)
        quality = measure(
            chosen, lambda what, done: progress.update(task, description=what, completed=done)
        )
    if as_json:
        print(msgspec.json.encode(quality).decode())
    else:
        console = Console(highlight=False)
        console.print(show.table(quality))
        if not quality.whole:
            console.print(f"Time was up after {quality.text.positions} positions.", soft_wrap=True)
        show_finding(console, quality.finding)
    return 1 if quality.finding.state == "wrong" else 0
