"""The system: what each check says of a machine that is right, and of one that is not."""

from __future__ import annotations

import resource
import socket
from collections.abc import Callable

import pytest

from mlx_receiver.checks import machine
from mlx_receiver.interfaces import Interface

WIRED = Interface("en0", "wired", ("10.0.0.2",), 10_000, "Ethernet")
SLOW = Interface("en5", "wired", ("10.0.0.3",), 1000, "USB LAN")
RADIO = Interface("en1", "wifi", ("192.168.1.7",))
TUNNEL = Interface("utun0", "virtual", ("100.64.0.9",))


def says(value: str | None) -> Callable[..., str | None]:
    return lambda *command: value


@pytest.mark.parametrize(
    ("system", "processor", "translated", "state", "seen"),
    [
        ("darwin", "arm64", "0\n", "fine", "Apple silicon"),
        ("darwin", "x86_64", "1\n", "wrong", "Rosetta"),
        ("darwin", "x86_64", None, "wrong", "x86_64"),
        ("linux", "aarch64", None, "unchecked", "no Mac"),
    ],
)
def test_architecture(
    system: str, processor: str, translated: str | None, state: str, seen: str
) -> None:
    found = machine.check_architecture(system, processor, says(translated))
    assert (found.state, seen in found.seen) == (state, True)
    assert bool(found.remedy) == (state == "wrong")


@pytest.mark.parametrize(
    ("version", "state"), [("14.0", "fine"), ("26.1", "fine"), ("13.6.1", "wrong"), ("", "wrong")]
)
def test_macos(version: str, state: str) -> None:
    assert machine.check_macos(version).state == state


def test_python() -> None:
    assert machine.check_python((3, 14, 0)).state == "fine"
    found = machine.check_python((3, 9, 6))
    assert (found.state, found.seen) == ("wrong", "3.9.6 is too old")


@pytest.mark.parametrize(
    ("mlx", "lm", "metal", "state"),
    [
        ("0.32.4", "0.32.2", "0.32.4", "fine"),
        ("0.31.2", "0.32.2", "0.31.2", "wrong"),
        ("0.32.4", "0.31.3", "0.32.4", "wrong"),
        ("0.32.4", None, "0.32.4", "wrong"),
        ("0.32.4", "0.32.2", "0.32.1", "wrong"),
        ("0.32.4", "0.32.2", None, "wrong"),
        ("0.40.0", "0.32.2", "0.40.0", "warning"),
    ],
)
def test_packages(mlx: str, lm: str | None, metal: str | None, state: str) -> None:
    installed = {"mlx": mlx, "mlx-lm": lm, "mlx-metal": metal}
    found = machine.check_packages(installed.get, darwin=True)
    assert found.state == state
    assert f"mlx {mlx}" in found.seen
    assert ("pip install" in found.remedy) == (state != "fine")


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = machine.check_port("--port", port)
        assert (found.name, found.state) == ("port", "wrong")
        assert f"{port} cannot be used (Address already in use" in found.seen
        assert f"lsof -nP -iTCP:{port}" in found.remedy
    assert machine.check_port("--port", port).state == "fine"
    assert machine.check_port("--data-port", 0).seen == "any free one"


def test_open_files() -> None:
    assert machine.check_files(256, resource.RLIM_INFINITY).state == "fine"
    assert machine.check_files(256, 10_240).state == "fine"
    assert machine.check_files(256, 256).state == "warning"


@pytest.mark.parametrize(
    ("output", "state"),
    [
        ("Firewall is disabled. (State = 0)\n", "fine"),
        ("Firewall is enabled. (State = 1)\n", "warning"),
        ("Firewall is blocking all non-essential incoming connections. (State = 2)\n", "wrong"),
        ("usage: socketfilterfw", "unchecked"),
        (None, "unchecked"),
    ],
)
def test_firewall(output: str | None, state: str) -> None:
    found = machine.check_firewall(output, "/opt/python")
    assert found.state == state
    assert bool(found.remedy) == (state in ("warning", "wrong"))


PMSET = """\
System-wide power settings:
Currently in use:
 standby              1
 hibernatefile        /var/vm/sleepimage
 powernap             1
 disksleep            10
 sleep                {sleep}
 displaysleep         10
 tcpkeepalive         1
 lowpowermode         {low}
 womp                 1
"""


@pytest.mark.parametrize(
    ("sleep", "low", "state", "seen"),
    [
        ("0", 0, "fine", "never when idle"),
        ("1 (sleep prevented by sharingd)", 0, "fine", "after 1 idle minutes"),
        ("10", 1, "warning", "low power mode"),
    ],
)
def test_sleep(sleep: str, low: int, state: str, seen: str) -> None:
    found = machine.check_sleep(PMSET.format(sleep=sleep, low=low))
    assert (found.state, seen in found.seen) == (state, True)
    assert machine.check_sleep(None).state == "unchecked"


@pytest.mark.parametrize(
    ("found", "state", "seen"),
    [
        ([WIRED, RADIO, TUNNEL], "fine", "10.0.0.2 (en0, 10 Gbit/s); 192.168.1.7 (en1, Wi-Fi)"),
        ([SLOW, RADIO], "warning", "en5 is a bottleneck"),
        ([RADIO], "warning", "only Wi-Fi"),
        ([TUNNEL], "warning", "none of them is hardware"),
        ([], "wrong", "none is up"),
    ],
)
def test_interfaces(found: list[Interface], state: str, seen: str) -> None:
    said = machine.check_interfaces(found)
    assert (said.state, seen in said.seen) == (state, True), said
