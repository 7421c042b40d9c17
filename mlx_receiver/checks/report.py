"""All checks in order, what they come to, and what to type next."""

from __future__ import annotations

import platform
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from threading import Timer
from typing import Final

import msgspec

from mlx_receiver import __version__
from mlx_receiver.checks.child import Begin, Facts, Found, Line
from mlx_receiver.checks.finding import Finding
from mlx_receiver.checks.machine import machine_checks
from mlx_receiver.interfaces import Interface, interfaces

_MARKS: Final = {"fine": "[green]✓[/]", "warning": "[yellow]![/]", "wrong": "[red]✗[/]",
                 "unchecked": "[dim]–[/]"}  # fmt: skip

#: Seconds for the checks that use MLX, without and with a model of the user's.
_SECONDS: Final = (120.0, 1800.0)

CHILD: Final = (sys.executable, "-m", "mlx_receiver.checks.child")

_line_decoder: Final = msgspec.json.Decoder(Line)


@dataclass
class Report:
    """The checks of one machine. ``findings`` runs them."""

    model: str = ""
    port: int = 7790
    data_port: int = 0
    http_port: int = 7791
    child: Sequence[str] = CHILD
    seen: list[Finding] = field(default_factory=list)
    _found: list[Interface] = field(default_factory=list)
    _vllm_name: str = ""

    def findings(self) -> Iterator[Finding]:
        """Run every check; each finding when it is there."""
        self._found = interfaces()
        ports = [("--port", self.port), ("--data-port", self.data_port)]
        if self.http_port >= 0:
            ports.append(("--http-port", self.http_port))
        for finding in machine_checks(ports, self._found):
            self.seen.append(finding)
            yield finding
        for finding in self._in_child():
            self.seen.append(finding)
            yield finding

    @property
    def ready(self) -> bool:
        """Whether nothing is wrong."""
        return not any(finding.state == "wrong" for finding in self.seen)

    def commands(self) -> tuple[str, list[str]]:
        """What starts the receiver here; and on the vLLM machine what pairs it, once, what checks
        the way from there, and what starts vLLM."""
        options = f" --model {self.model}" if self.model else ""
        for option, number, usual in (
            ("--port", self.port, 7790),
            ("--data-port", self.data_port, 0),
            ("--http-port", self.http_port, 7791),
        ):
            options += f" {option} {number}" if number != usual else ""
        vllm_model = self._vllm_name or "MODEL"
        return (
            f"mlx-receiver start{options}",
            [
                "mac-decode pair CODE",
                f"mac-decode check --model {vllm_model}",
                f"vllm serve {vllm_model} --kv-connector mac_decode",
            ],
        )

    def json(self) -> str:
        """Everything, for a report that may be published."""
        here, there = self.commands()
        return msgspec.json.format(
            msgspec.json.encode(
                {
                    "command": "mlx-receiver check",
                    "version": __version__,
                    "platform": platform.platform(),
                    "model": self.model,
                    "ready": self.ready,
                    "findings": self.seen,
                    "here": here,
                    "there": there,
                }
            )
        ).decode()

    def _in_child(self) -> Iterator[Finding]:
        """The findings of the checks that use MLX, and one of how that process ended if it broke
        off."""
        process = subprocess.Popen(
            [*self.child, self.model], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        seconds = _SECONDS[bool(self.model)]
        watchdog = Timer(seconds, process.kill)
        watchdog.start()
        check = "MLX"
        try:
            for raw in process.stdout:
                match _line_decoder.decode(raw):
                    case Begin(name):
                        check = name
                    case Found(finding):
                        yield finding
                    case Facts(name):
                        self._vllm_name = name
        finally:
            late = not watchdog.is_alive()
            watchdog.cancel()
            process.kill()
            process.stdout.close()
            status = process.wait()
        if late:
            yield Finding(check, "wrong", f"still not done after {seconds:.0f} s", _REPORT_IT)
        elif status > 0:
            yield Finding(check, "wrong", f"the process ended with status {status}", _REPORT_IT)
        elif status < 0:
            name = signal.Signals(-status).name
            yield Finding(check, "wrong", f"it ended the process with {name}", _REPORT_IT)


_REPORT_IT: Final = "Report it, with what was printed above"


def run_and_print(report: Report, as_json: bool) -> int:
    """Run the checks and say them; the exit status."""
    if as_json:
        for _ in report.findings():
            pass
        print(report.json())
        return 0 if report.ready else 1
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    for finding in report.findings():
        console.print(f"{_MARKS[finding.state]} [bold]{finding.name}[/]: {escape(finding.seen)}")
        if finding.remedy:
            console.print(f"  → {escape(finding.remedy)}")
    if not report.ready:
        wrong = [finding.name for finding in report.seen if finding.state == "wrong"]
        console.print(f"[bold]Not ready:[/] {escape(', '.join(wrong))}")
        return 1
    here, there = report.commands()
    console.print("[bold]Nothing is wrong here.[/] Start the receiver:")
    console.print(f"  {here}", markup=False)
    console.print("then, on the vLLM machine, with the code that it shows:")
    for command in there:
        console.print(f"  {command}", markup=False)
    return 0
