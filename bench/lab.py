"""What the benches share: a shaped link between two namespaces, processes in them, and records."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

#: Bytes a second of a 10 Gbit link: what nothing on it can exceed.
LINK_10G = 1.25e9

#: For every vLLM of a comparison on one machine. Left to itself, its CPU build keeps a core free,
#: and two with a connector unless there are no more: then none. The servers would not be equals.
ALL_CORES = {"VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}"}

_CLONE_NEWNET = 0x40000000

_PACKAGES = ("mlx", "mlx-lm", "torch", "vllm", "pyzmq", "nixl", "numpy", "vllm-mac-decode")


class NoRights(Exception):
    """This machine or user cannot emulate a link; the text says what is missing."""


@dataclass(frozen=True)
class Place:
    """Where a process runs, and the address that the other side reaches it at."""

    address: str
    namespace: str = ""
    device: str = ""

    def command(self, arguments: Sequence[str]) -> list[str]:
        """``arguments`` as a command that runs there."""
        inside = ["ip", "netns", "exec", self.namespace] if self.namespace else []
        return [*inside, *arguments]

    def enter(self) -> None:
        """Move this thread there, and every thread and process that it starts from now on."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/var/run/netns/{self.namespace}") as namespace:
            if libc.setns(namespace.fileno(), _CLONE_NEWNET):
                raise NoRights(f"setns: {os.strerror(ctypes.get_errno())}")

    def plug(self, connected: bool) -> None:
        """Connect or disconnect its end of the link; nobody at either end is told."""
        state = "up" if connected else "down"
        _root(*self.command(["ip", "link", "set", self.device, state]))


LOOPBACK = (Place("127.0.0.1"), Place("127.0.0.1"))


@contextlib.contextmanager
def shaped_link(
    rate: str = "10gbit", burst: str = "2mb", limit: str = "16mb", mtu: int = 9000
) -> Iterator[tuple[Place, Place]]:
    """Two network namespaces joined by a veth pair that lets ``rate`` through, each way.

    Packets of one connection arrive in the order in which they were sent, as on a cable: they are
    received on one CPU (RPS), as from one queue of a network card. Left to itself, a veth pair
    receives on whichever CPU sends: one packet in 600 was overtaken, and TCP halved its window for
    losses that were none.

    Raises NoRights where that cannot be set up (no root, no ``ip``, no ``tc``).
    """
    names = [f"macdecode-{os.getpid()}-{side}" for side in "ab"]
    ends = [f"md{os.getpid()}{side}"[:15] for side in "ab"]
    addresses = ["10.231.0.1", "10.231.0.2"]
    cpus = (1 << min(os.cpu_count() or 1, 32)) - 1
    try:
        for name in names:
            _root("ip", "netns", "add", name)
        _root("ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for name, end, address in zip(names, ends, addresses, strict=True):
            inside = ("ip", "netns", "exec", name)
            _root("ip", "link", "set", end, "netns", name)
            _root(*inside, "ip", "address", "add", f"{address}/30", "dev", end)
            _root(*inside, "ip", "link", "set", end, "mtu", str(mtu), "up")
            _root(*inside, "ip", "link", "set", "lo", "up")
            shape = f"root tbf rate {rate} burst {burst} limit {limit}".split()
            _root(*inside, "tc", "qdisc", "add", "dev", end, *shape)
            steering = f"/sys/class/net/{end}/queues/rx-0/rps_cpus"
            _root(*inside, "sh", "-c", f"echo {cpus:x} > {steering}")
        yield (
            Place(addresses[0], names[0], ends[0]),
            Place(addresses[1], names[1], ends[1]),
        )
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


@contextlib.contextmanager
def link_or_loopback(rate: str) -> Iterator[tuple[tuple[Place, Place], str]]:
    """A ``shaped_link``; none for "loopback", and where it cannot be set up: why, in words."""
    with contextlib.ExitStack() as stack:
        places, skipped = LOOPBACK, ""
        if rate != "loopback":
            try:
                places = stack.enter_context(shaped_link(rate=rate))
            except NoRights as error:
                skipped = str(error)
        yield places, skipped


def _root(*command: str) -> None:
    try:
        subprocess.run(command, capture_output=True, check=True, text=True)
    except FileNotFoundError:
        raise NoRights(f"no {command[0]!r} command (package iproute2)") from None
    except subprocess.CalledProcessError as error:
        raise NoRights(f"{' '.join(command)}: {error.stderr.strip()} (root is needed)") from None


class Child:
    """A process at a ``Place`` that is told and tells JSON lines.

    Its program reads ``orders()`` and answers each with ``tell``.
    """

    def __init__(self, place: Place, *arguments: str) -> None:
        self._process = subprocess.Popen(
            place.command([sys.executable, *arguments]),
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **order: Any) -> Any:
        """Give an order and wait for its answer. Raises RuntimeError when the process died."""
        self.order(**order)
        return self.answer()

    def order(self, **order: Any) -> None:
        """Give an order."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """The next answer."""
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
            sys.stderr.write(line)  # what some library says
        raise RuntimeError(f"{self._process.args} ended with {self._process.wait()}")

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def orders() -> Iterator[Any]:
    """In a Child: what it is told, until its parent is done."""
    for line in sys.stdin:
        yield json.loads(line)


def tell(**answer: Any) -> None:
    """In a Child: one answer."""
    print(json.dumps(answer), flush=True)


def record(what: str) -> dict[str, Any]:
    """What every result says of its origin: what, command, machine, versions, date."""
    return {
        "what": what,
        "command": shlex.join(["python", "-m", f"bench.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "machine": {
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "memory_gib": round(
                os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1
            ),
            "load_1min_at_start": os.getloadavg()[0],
            "tcp_congestion_control": _first_line("/proc/sys/net/ipv4/tcp_congestion_control"),
        },
        "versions": {"python": platform.python_version()} | _versions(),
    }


def save(result: dict[str, Any], path: Path) -> None:
    """Write a result as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def spread(values: Iterable[float], digits: int = 4) -> dict[str, float]:
    """Median and 90th percentile."""
    ordered = sorted(values)
    if not ordered:
        return {}
    high = ordered[min(len(ordered) - 1, round(0.9 * (len(ordered) - 1)))]
    return {"p50": round(statistics.median(ordered), digits), "p90": round(high, digits)}


def fastest_first(links: Iterable[str]) -> list[str]:
    """Each of these links once: ``loopback``, then ``...gbit``."""
    return sorted(
        set(links), key=lambda link: -float(link.removesuffix("gbit")) if "gbit" in link else -1e9
    )


def _cpu() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _first_line(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text().strip()
    return ""


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
