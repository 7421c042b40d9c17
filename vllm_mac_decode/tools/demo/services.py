"""The demo's two servers as child processes that never outlive it."""

from __future__ import annotations

import atexit
import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# $1 is the seconds that the server has to end by itself. Its process group comes in a line; then
# waits for the end of the standard input, which comes when the process that holds the other end is
# gone, however it went. vLLM may miss a SIGTERM while it starts: then the group is killed.
_GUARD = """
read -r group || exit
read -r _
kill -TERM "$group"
while [ "$1" -gt 0 ]; do
    kill -0 -"$group" || exit
    sleep 1
    set -- $(($1 - 1))
done
kill -KILL -"$group"
"""
# vLLM's "(EngineCore pid=12) INFO 11-22 10:00:00 [file.py:1] ", logging's, terminal colours.
_DECORATION = re.compile(
    r"\x1b\[[0-9;]*[A-Za-z]|^\([^)]*pid=\d+\)\s*|^[A-Z]+ [\d-]+ [\d:]+ (\[[^\]]*\] )?"
    r"|^[\d-]+ [\d:,]+ [A-Z]+ \S+ "
)


class ServiceDied(RuntimeError):
    """A server ended by itself; the text holds the end of its log."""


class Service:
    """One server in a process group of its own, with its output in a file.

    It is ended by ``stop``, at the latest when this interpreter exits, and by a guard beside it
    when this process is killed.
    """

    def __init__(
        self,
        name: str,
        command: list[str],
        log: Path,
        environment: dict[str, str] | None = None,
        patience: int = 15,
    ) -> None:
        """``patience`` is the seconds that it has to end by itself once it was asked to."""
        self.name = name
        self.log = log
        self._patience = patience
        # Before the server, which is not to be without one for as long as a process takes to start.
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, "guard", str(patience)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._guard.stdin is not None
        try:
            with log.open("wb") as output:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
        except BaseException:
            self._guard.communicate()
            raise
        self._guard.stdin.write(b"%d\n" % self._process.pid)
        self._guard.stdin.flush()
        self._over = False
        atexit.register(self.stop)

    def check(self) -> None:
        """Raise ServiceDied if the server has ended."""
        status = self._process.poll()
        if status is not None:
            raise ServiceDied(
                f"{self.name} ended with status {status}. The end of {self.log}:\n{self.tail()}"
            )

    def wait(self, seconds: float) -> int | None:
        """The exit status, or None if the process still runs after that many seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(seconds)
        return None

    def tail(self, lines: int = 25) -> str:
        """The last lines of the log."""
        text = self.log.read_text(errors="replace").replace("\r", "\n")
        return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])

    def last_line(self) -> str:
        """What the server says it is doing, without the decoration of log lines."""
        line = self.tail(1)
        while (plain := _DECORATION.sub("", line)) != line:
            line = plain
        return line.strip()

    def stop(self) -> None:
        """End the server and everything that it started. Safe to call more than once."""
        if self._over:
            return
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(self._patience)
        # The server may be gone while processes that it started are not.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._guard.kill()
        self._guard.communicate()
        self._over = True
        atexit.unregister(self.stop)


def _in_any_order() -> Iterator[int]:
    anybody = random.SystemRandom()  # no seed that another process may share
    while True:
        yield from anybody.sample(_NOBODYS_PORTS, len(_NOBODYS_PORTS))


#: Below those that systems give to outgoing connections (from 32,768 on Linux, 49,152 on macOS):
#: one of theirs can be free when it is chosen and taken when a server wants to listen.
_NOBODYS_PORTS = range(20_000, 32_768)
_candidates = _in_any_order()


def free_ports(count: int) -> list[int]:
    """TCP ports of this machine that nothing listens on, none given twice."""
    found: list[int] = []
    while len(found) < count:
        port = next(_candidates)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
    return found


def console_script(name: str) -> str:
    """The command of that name in the environment that runs this program."""
    return str(Path(sys.executable).with_name(name))
