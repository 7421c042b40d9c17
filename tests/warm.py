"""Servers that need not import what all of them import: a process has done so, and forks.

``vllm serve`` is three processes, and each of them takes seconds of a core for its imports, more
than for all the rest of a start. So a process imports the libraries once, and becomes one server
after the other by ``fork``, each in a session of its own, with the arguments, the environment and
the output that it would have had. Processes that vLLM starts by ``spawn`` are forked, too; vLLM
itself knows both ways.

``python -m tests.warm MODULE...`` is that process: it reads an order a line, as JSON, and answers
with a process id. The exit status of that process is written to a file once it has ended.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import multiprocessing
import os
import pkgutil
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

#: Set by ``python -m tests``: whoever else starts servers wants them as their users do.
VARIABLE = "TESTS_START_WARM"

#: What vLLM's three processes import, and a receiver: modules, and functions to call. A version may
#: lack some.
VLLM = (
    "vllm.entrypoints.cli.main", "vllm.entrypoints.cli.serve", "vllm.entrypoints.cli.launch",
    "vllm.entrypoints.cli.openai", "vllm.entrypoints.cli.benchmark.main",
    "vllm.entrypoints.cli.run_batch", "vllm.entrypoints.openai.api_server", "vllm.v1.engine.core",
    "vllm.v1.engine.async_llm", "vllm.v1.executor.multiproc_executor", "vllm.v1.worker.cpu_worker",
    "vllm.v1.attention.backends.cpu_attn", "vllm.model_executor.models.llama",
    "vllm.model_executor.model_loader", "vllm.v1.structured_output.backend_xgrammar",
    "compressed_tensors.compressors", "compressed_tensors.offload",
    "model_hosting_container_standards.sagemaker", "uvicorn.protocols.http.auto", "zeroconf",
)  # fmt: skip
RECEIVER = (
    "mlx_receiver.decode.blas:use_fast_blas",  # before MLX
    "mlx_receiver.cli", "mlx_receiver.serve", "mlx_receiver.receiver", "mlx_lm",
    "mlx_lm.models.llama", "transformers.models.auto.tokenization_auto",
)  # fmt: skip


#: What is known of how an orphan ended.
LOST = -signal.SIGKILL

#: What is imported must not depend on the test that needs the first server.
_ENVIRONMENT = dict(os.environ)

#: At which it is looked who has ended.
_ENDINGS = (signal.SIGCHLD, signal.SIGALRM)

_lock = threading.Lock()
_forkers: dict[tuple[str, ...], Forker] = {}


class Forked:
    """As much of ``subprocess.Popen`` as tests use, for a process that is somebody else's child."""

    def __init__(self, pid: int, status: Path, parent: subprocess.Popen[str]) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._status = status
        self._parent = parent

    def poll(self) -> int | None:
        """The exit status, if it has ended."""
        if self.returncode is None:
            orphan = self._parent.poll() is not None
            with contextlib.suppress(FileNotFoundError):
                self.returncode = int(self._status.read_text())
            if self.returncode is None and orphan and not _runs(self.pid):
                self.returncode = LOST
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, once it has ended."""
        until = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if timeout is not None and until is not None and time.monotonic() > until:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.02)
        return status

    def send_signal(self, number: int) -> None:
        """Nothing if it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """At once."""
        self.send_signal(signal.SIGKILL)


def _runs(pid: int) -> bool:
    """Whether there is such a process, and nobody only has not asked yet how it ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


class Forker:
    """The process that has imported ``modules``."""

    def __init__(self, modules: tuple[str, ...]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mac-decode-forked-")
        self._lock = threading.Lock()
        self._orders = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm", *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
            env=_ENVIRONMENT | {"HF_HUB_OFFLINE": "1"},
        )
        atexit.register(self.close)

    @property
    def ended(self) -> bool:
        """Whether it can fork no more, as somebody has ended it."""
        return self._process.poll() is not None

    def start(
        self, command: list[str], log: Path, env: dict[str, str], network: str = ""
    ) -> Forked:
        """A process that does as Python does with this script (or ``-m`` and a module) and these
        arguments, in a network namespace: this thread's, or that of this name."""
        assert self._process.stdin is not None and self._process.stdout is not None
        log.write_bytes(b"")  # it is there at once, and who cannot write it hears of it
        with self._lock:
            self._orders += 1
            command = command[command[0] == sys.executable :]
            status = Path(self._folder.name) / str(self._orders)
            order = {"command": command, "log": str(log), "env": env, "cwd": os.getcwd(),
                     "status": str(status), "network": _path(network)}  # fmt: skip
            answer = ""
            with contextlib.suppress(BrokenPipeError):
                print(json.dumps(order), file=self._process.stdin, flush=True)
                answer = self._process.stdout.readline()
            if not answer:
                raise AssertionError(f"whoever forks servers ended: {self._process.wait()}")
            return Forked(int(answer), status, self._process)

    def close(self) -> None:
        """End it; what it has forked goes on."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # what it has not read
                pipe.close()
        self._folder.cleanup()


def _path(network: str) -> str:
    return f"/var/run/netns/{network}" if network else f"/proc/{threading.get_native_id()}/ns/net"


def forker(modules: tuple[str, ...]) -> Forker:
    """The one of this run, or another one if that has ended."""
    with _lock:
        if (found := _forkers.get(modules)) is None or found.ended:
            found = _forkers[modules] = Forker(modules)
        return found


def possible() -> bool:
    """Whether this is for ``python -m tests``. There OpenMP has one thread: more would not survive
    a fork."""
    return sys.platform == "linux" and os.environ.get(VARIABLE) == "1"


def fork_what_is_spawned() -> None:
    """From now on, and also what is started by what this process starts."""
    made = multiprocessing.get_context

    def get_context(method: str | None = None) -> Any:
        return made("fork" if method == "spawn" else method)

    multiprocessing.get_context = get_context  # type: ignore[assignment]
    # A signal would be written into the pipe by which the parent's event loop hears of its own.
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1) and None)


def _become(order: dict[str, Any], network: int, answers: int) -> None:
    """Whoever has been forked becomes the process that was asked for, in this network."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    output = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for old, new in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(old, new)
    os.close(nothing)
    os.close(output)
    # From here on it can be signalled as a group, and what goes wrong is in its log.
    os.write(answers, f"{os.getpid()}\n".encode())
    os.close(answers)
    if not os.path.samestat(os.fstat(network), os.stat("/proc/self/ns/net")):
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(network, 0):
            raise OSError(ctypes.get_errno(), "setns")
    os.close(network)
    for number in (signal.SIGINT, signal.SIGCHLD, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDINGS)
    os.environ.clear()
    os.environ.update(order["env"])
    os.chdir(order["cwd"])
    fork_what_is_spawned()
    sys.argv = order["command"]
    if sys.argv[0] == "-m":
        sys.path[0] = order["cwd"]
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(sys.argv[0]).parent)
        runpy.run_path(sys.argv[0], run_name="__main__")


def _ended(statuses: dict[int, str]) -> None:
    """Write down how those ended that have."""
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            pid, status = found
            if (name := statuses.pop(pid, None)) is None:
                continue  # a library's
            path = Path(name)
            partial = path.with_suffix(".partial")
            partial.write_text(str(os.waitstatus_to_exitcode(status)))
            partial.rename(path)


def main() -> None:
    """Import, then fork whenever there is an order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the tests hear it, and stop their servers
    answers = os.dup(1)
    os.dup2(2, 1)  # libraries print
    for name in sys.argv[1:]:
        with contextlib.suppress(Exception):  # a server says what is wrong when it imports it
            if callable(found := pkgutil.resolve_name(name)):
                found()
    statuses: dict[int, str] = {}
    signal.signal(signal.SIGCHLD, lambda *_: _ended(statuses))
    # One that ends just before the next order is waited for would be noticed after that order.
    signal.signal(signal.SIGALRM, lambda *_: _ended(statuses))
    signal.setitimer(signal.ITIMER_REAL, 0.5, 0.5)
    for line in sys.stdin:
        order = json.loads(line)
        network = os.open(order["network"], os.O_RDONLY)
        signal.pthread_sigmask(signal.SIG_BLOCK, _ENDINGS)
        pid = os.fork()
        if not pid:
            break
        os.close(network)
        statuses[pid] = order["status"]
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDINGS)
    else:
        return
    _become(order, network, answers)


if __name__ == "__main__":
    main()
