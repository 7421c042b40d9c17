"""Machines for these tests: network namespaces with cables between them, and what runs there."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import pytest

from bench.lab import NoRights, Place

_T = TypeVar("_T")


@dataclass
class Host:
    """A machine: ``run`` calls something there; threads that it starts are there, too."""

    place: Place
    cables: list[str]
    pool: ThreadPoolExecutor

    def run(self, call: Callable[..., _T], *args: object, **options: object) -> _T:
        return self.pool.submit(call, *args, **options).result(60)

    def ip(self, *arguments: str) -> None:
        command(*self.place.command(["ip", *arguments]))

    def shape(self, cable: int, mbits: int) -> None:
        """Let so much through its end of the cable."""
        rate = f"root tbf rate {mbits}mbit burst 256kb limit 4mb".split()
        command(*self.place.command(["tc", "qdisc", "add", "dev", self.cables[cable], *rate]))

    def address(self, cable: int, version: int) -> str:
        """The one of that version that its end of the cable has."""
        listed = subprocess.run(
            self.place.command(["ip", "-o", f"-{version}", "address", "show", self.cables[cable]]),
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        return listed.split()[3].partition("/")[0]


@contextlib.contextmanager
def two_hosts(cables: int = 1, ipv4: bool = True) -> Iterator[tuple[Host, Host]]:
    """Two of them, with that many cables, each a network of its own; without root, a skip."""
    names = [f"discovery-{os.getpid()}-{side}" for side in "ab"]
    ends = [[f"dc{os.getpid()}{side}{n}"[-15:] for n in range(cables)] for side in "ab"]
    try:
        with contextlib.ExitStack() as stack:
            for name in names:
                command("ip", "netns", "add", name)
                stack.callback(
                    subprocess.run,
                    ["ip", "netns", "delete", name],
                    capture_output=True,
                    check=False,
                )
                command("ip", "-n", name, "link", "set", "lo", "up")
            for n in range(cables):
                plug_in(names, [ends[0][n], ends[1][n]], n, ipv4)
            hosts = []
            for name, own in zip(names, ends, strict=True):
                place = Place("", name, own[0] if own else "")
                pool = stack.enter_context(ThreadPoolExecutor(1, initializer=place.enter))
                hosts.append(Host(place, own, pool))
            yield hosts[0], hosts[1]
    except NoRights as error:
        pytest.skip(str(error))


def plug_in(names: list[str], ends: list[str], number: int, ipv4: bool = True) -> None:
    """A cable between two namespaces. Raises NoRights."""
    command("ip", "link", "add", ends[0], "netns", names[0], "type", "veth",
            "peer", "name", ends[1], "netns", names[1])  # fmt: skip
    for side, (name, end) in enumerate(zip(names, ends, strict=True), 1):
        # Waiting for duplicates of an IPv6 address takes two seconds.
        inside = ("ip", "netns", "exec", name)
        command(*inside, "sh", "-c", f"echo 0 > /proc/sys/net/ipv6/conf/{end}/accept_dad")
        if ipv4:
            command("ip", "-n", name, "address", "add", f"10.232.{number}.{side}/30", "dev", end)
        command("ip", "-n", name, "link", "set", end, "up")


def command(*arguments: str) -> None:
    """Run it. Raises NoRights where it cannot be."""
    try:
        subprocess.run(arguments, capture_output=True, check=True, text=True)
    except FileNotFoundError:
        raise NoRights(f"no {arguments[0]!r} command (package iproute2)") from None
    except subprocess.CalledProcessError as error:
        raise NoRights(f"{' '.join(arguments)}: {error.stderr.strip()}") from None
