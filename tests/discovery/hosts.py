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
        command(*self.place.command(["tc", "qdisc", "replace", "dev", self.cables[cable], *rate]))

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
    ends = [[f"dc{os.getpid()}{side}{n}"[-15:] for n in range(cables)] for side in "ab"]
    with _hosts(ends) as (names, hosts):
        for n in range(cables):
            _or_skip(lambda n=n: plug_in(names, [ends[0][n], ends[1][n]], n, ipv4))
        yield hosts[0], hosts[1]


@contextlib.contextmanager
def switched(count: int) -> Iterator[list[Host]]:
    """That many of them at one switch: ``10.233.0.1`` and so on; without root, a skip."""
    ends = [[f"sw{os.getpid()}h{n}"[-15:]] for n in range(count)]
    with _hosts([*ends, []]) as (names, hosts):

        def connect() -> None:
            *others, switch = names
            command(
                "ip", "-n", switch, "link", "add", "sw", "type", "bridge", "mcast_snooping", "0"
            )
            command("ip", "-n", switch, "link", "set", "sw", "up")
            for n, name in enumerate(others):
                port, end = f"port{n}", ends[n][0]
                command("ip", "link", "add", end, "netns", name, "type", "veth",
                        "peer", "name", port, "netns", switch)  # fmt: skip
                command("ip", "-n", switch, "link", "set", port, "master", "sw", "up")
                bring_up(name, end, f"10.233.0.{n + 1}/24")

        _or_skip(connect)
        yield hosts[:count]


@contextlib.contextmanager
def _hosts(ends: list[list[str]]) -> Iterator[tuple[list[str], list[Host]]]:
    """One for each list of its cables' ends, and the namespaces' names; not connected yet."""
    names = [f"discovery-{os.getpid()}-{n}" for n in range(len(ends))]
    with contextlib.ExitStack() as stack:
        hosts = []
        for name, own in zip(names, ends, strict=True):
            _or_skip(lambda name=name: command("ip", "netns", "add", name))
            stack.callback(
                subprocess.run, ["ip", "netns", "delete", name], capture_output=True, check=False
            )
            _or_skip(lambda name=name: command("ip", "-n", name, "link", "set", "lo", "up"))
            place = Place("", name, own[0] if own else "")
            pool = stack.enter_context(ThreadPoolExecutor(1, initializer=place.enter))
            hosts.append(Host(place, own, pool))
        yield names, hosts


def _or_skip(call: Callable[[], None]) -> None:
    try:
        call()
    except NoRights as error:
        pytest.skip(str(error))


def bring_up(name: str, end: str, address: str) -> None:
    """An end of a cable in a namespace; without an ``address`` it has IPv6's own only."""
    # Waiting for duplicates of an IPv6 address takes two seconds.
    inside = ("ip", "netns", "exec", name)
    command(*inside, "sh", "-c", f"echo 0 > /proc/sys/net/ipv6/conf/{end}/accept_dad")
    if address:
        command("ip", "-n", name, "address", "add", address, "dev", end)
    command("ip", "-n", name, "link", "set", end, "up")


def plug_in(names: list[str], ends: list[str], number: int, ipv4: bool = True) -> None:
    """A cable between two namespaces. Raises NoRights."""
    command("ip", "link", "add", ends[0], "netns", names[0], "type", "veth",
            "peer", "name", ends[1], "netns", names[1])  # fmt: skip
    for side, (name, end) in enumerate(zip(names, ends, strict=True), 1):
        bring_up(name, end, f"10.232.{number}.{side}/30" if ipv4 else "")


def command(*arguments: str) -> None:
    """Run it. Raises NoRights where it cannot be."""
    try:
        subprocess.run(arguments, capture_output=True, check=True, text=True)
    except FileNotFoundError:
        raise NoRights(f"no {arguments[0]!r} command (package iproute2)") from None
    except subprocess.CalledProcessError as error:
        raise NoRights(f"{' '.join(arguments)}: {error.stderr.strip()}") from None
