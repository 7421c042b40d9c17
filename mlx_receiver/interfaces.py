"""This machine's network interfaces: addresses that another machine can use, and how fast they are.

Read from what the system's own commands print, as no library of ours knows an interface's speed
and whether it is Wi-Fi.
"""

from __future__ import annotations

import ipaddress
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from mlx_receiver.settings import SettingsError
from mlx_receiver.wire.addresses import EVERYWHERE, bare, listening, resolve

Kind = Literal["wired", "wifi", "virtual"]

_ORDER: Final = ("wired", "wifi", "virtual")

#: A speed in ``ifconfig``'s media line: 1000baseT, 2500Base-T, 10Gbase-T, 2.5GbaseT.
_MEDIA: Final = re.compile(r"\b(\d+(?:\.\d+)?)(G?)base", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Interface:
    """One that is up. ``addresses`` are numeric, IPv4 before IPv6, link-local ones last of each;
    those of IPv6 that are link-local are left out, since another machine calls them otherwise.
    ``mbits`` is its speed in Mbit/s, None where the system does not say."""

    name: str
    kind: Kind
    addresses: tuple[str, ...]
    mbits: int | None = None
    #: What the system calls it, e.g. "Thunderbolt Bridge".
    port: str = ""

    @property
    def text(self) -> str:
        """``en0, 10 Gbit/s`` or ``en1, Wi-Fi``."""
        parts = [self.name]
        if self.kind == "wifi":
            parts.append("Wi-Fi")
        elif self.port and self.port != "Ethernet":
            parts.append(self.port)
        elif self.kind == "virtual":
            parts.append("virtual")
        if self.mbits:
            speed = (
                f"{self.mbits / 1000:g} Gbit/s" if self.mbits >= 1000 else f"{self.mbits} Mbit/s"
            )
            parts.append(speed)
        return ", ".join(parts)


def interfaces() -> list[Interface]:
    """Those that are up and have an address, in order of preference; loopback is none."""
    return ordered(present())


def present() -> list[Interface]:
    """All that are up, in the system's order, also those without an address for others."""
    if sys.platform == "darwin":
        return of_macos(
            run("/sbin/ifconfig", "-a") or "",
            run("/usr/sbin/networksetup", "-listallhardwareports") or "",
        )
    return _of_linux()


def preference(interface: Interface) -> tuple[int, int]:
    """Less is better: wired before Wi-Fi before virtual ones; the fastest first, those of unknown
    speed last."""
    return _ORDER.index(interface.kind), -(interface.mbits or 0)


def reachable_at(host: str, found: Sequence[Interface]) -> list[tuple[str, Interface | None]]:
    """Numeric addresses at which a receiver that listens on ``host`` is reached, the best first,
    each with its interface; ``found`` are this machine's."""
    if bare(host) in (*EVERYWHERE, "0.0.0.0"):
        every = [(_first(interface, host), interface) for interface in found]
        return [(address, interface) for address, interface in every if address]
    try:
        numbers = dict.fromkeys(address.host for address in resolve(host, 0))
    except OSError:
        return [(bare(host), None)]
    of = {address: interface for interface in found for address in interface.addresses}
    order = list(of)
    named = [(number, of.get(number)) for number in numbers]
    return sorted(named, key=lambda n: order.index(n[0]) if n[0] in of else len(order))


def _first(interface: Interface, host: str) -> str:
    """Its best address, of version 4 where ``host`` takes no others."""
    return next((a for a in interface.addresses if ":" not in a or host != "0.0.0.0"), "")


def check_host(host: str) -> None:
    """Raise SettingsError, naming the addresses that there are, for one that cannot be listened
    on."""
    try:
        for server in listening(host, 0):
            server.close()
    except (OSError, UnicodeError) as error:
        # Python's own text goes on with the address.
        reason = str(getattr(error, "strerror", None) or error).partition(" (while")[0]
        mine = ", ".join(f"{i.addresses[0]} ({i.text})" for i in interfaces())
        raise SettingsError(
            f"--host {host} cannot be listened on ({reason}): 0.0.0.0 is every address of this "
            f"machine, 127.0.0.1 this machine alone; it has {mine or 'no network'}"
        ) from None


def ordered(found: Sequence[Interface]) -> list[Interface]:
    """Those with an address, in order of preference."""

    def rank(interface: Interface) -> tuple[tuple[int, int], bool]:
        first = ipaddress.ip_address(interface.addresses[0])
        return preference(interface), first.is_link_local

    return sorted((i for i in found if i.addresses), key=rank)


def of_macos(ifconfig: str, hardware_ports: str) -> list[Interface]:
    """What ``ifconfig -a`` and ``networksetup -listallhardwareports`` say."""
    ports = dict(
        (device, port)
        for port, device in re.findall(r"^Hardware Port: (.*)\nDevice: (.*)$", hardware_ports, re.M)
    )
    found = []
    # Each interface's paragraph begins at the margin.
    for paragraph in re.split(r"\n(?=\S)", ifconfig):
        name, _, rest = paragraph.partition(":")
        if "status: inactive" in rest or not re.search(r"<[^>]*\bUP\b", rest):
            continue
        addresses = re.findall(r"^\s+inet6? (\S+)", rest, re.M)
        media = re.search(r"^\s+media: (.*)$", rest, re.M)
        port = ports.get(name, "")
        kind: Kind = "wired" if port else "virtual"
        if port == "Wi-Fi" or port == "AirPort":
            kind = "wifi"
        found.append(
            Interface(name, kind, usable(addresses), _speed(media.group(1) if media else ""), port)
        )
    return found


def _speed(media: str) -> int | None:
    speed = _MEDIA.search(media)
    return int(float(speed[1]) * (1000 if speed[2] else 1)) if speed else None


def usable(addresses: Sequence[str]) -> tuple[str, ...]:
    """Those that another machine can use, in order; scopes (``%en0``) are this machine's."""
    found = [ipaddress.ip_address(address.partition("%")[0]) for address in addresses]
    kept = [a for a in found if not a.is_loopback and not (a.version == 6 and a.is_link_local)]
    return tuple(map(str, sorted(kept, key=lambda a: (a.version, a.is_link_local))))


def _of_linux(system: Path = Path("/sys/class/net")) -> list[Interface]:
    import ifaddr

    given: dict[str, list[str]] = {}
    for adapter in ifaddr.get_adapters(include_unconfigured=True):
        # An address with a label, eth0:1, is one of eth0's.
        ips = given.setdefault(adapter.name.partition(":")[0], [])
        # Of version 6 with flow and scope.
        ips += [ip.ip if isinstance(ip.ip, str) else ip.ip[0] for ip in adapter.ips]
    found = []
    for name, ips in given.items():
        folder = system / name
        addresses = usable(ips)
        if (folder / "wireless").exists():
            kind: Kind = "wifi"
        else:
            kind = "wired" if (folder / "device").exists() else "virtual"
        try:
            mbits = int((folder / "speed").read_text())
        except (OSError, ValueError):  # Wi-Fi and virtual ones have none
            mbits = 0
        found.append(Interface(name, kind, addresses, mbits if mbits > 0 else None))
    return found


def run(*command: str, seconds: float = 5.0) -> str | None:
    """What a command prints, None where it is not there, fails or takes longer."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
