"""The links that discovery works on: network interfaces with all of their addresses.

``interfaces`` knows addresses that can be told to another machine, and what kind of interface has
them. Multicast needs the others, too, and often looks whether they have changed.
"""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv6Interface
from typing import Final

from mlx_receiver.wire.addresses import EVERYWHERE, bare, resolve

Own = IPv4Interface | IPv6Interface

_SIOCGIFFLAGS: Final = 0xC0206911 if sys.platform == "darwin" else 0x8913
_UP: Final = 0x1
_LOOPBACK: Final = 0x8
_POINT_TO_POINT: Final = 0x10
_RUNNING: Final = 0x40
_MULTICAST: Final = 0x8000 if sys.platform == "darwin" else 0x1000

#: Apple's own links between devices, which the system does not let others use as networks.
_APPLES: Final = ("awdl", "llw", "anpi")


@dataclass(frozen=True, slots=True)
class Link:
    """An interface that is up. ``addresses`` with their networks: IPv4 before IPv6, link-local ones
    last of each. ``multicast``: it takes any."""

    name: str
    index: int
    addresses: tuple[Own, ...]
    loopback: bool = False
    multicast: bool = True


def links() -> list[Link]:
    """Those that are up and connected. Tunnels are none: multicast does not reach their other end.

    Raises OSError when the system does not say.
    """
    import ifaddr

    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for adapter in ifaddr.get_adapters():
            name, index = adapter.name, adapter.index
            if index is None or name.startswith(_APPLES):
                continue
            flags = _flags(any_socket, name)
            if not flags & _UP or not flags & _RUNNING or flags & _POINT_TO_POINT:
                continue
            addresses = [
                ipaddress.ip_interface(
                    f"{ip.ip if isinstance(ip.ip, str) else ip.ip[0]}/{ip.network_prefix}"
                )
                for ip in adapter.ips
            ]
            addresses.sort(key=lambda own: (own.version, own.ip.is_link_local, own.ip.packed))
            loopback = bool(flags & _LOOPBACK)
            # Linux's loopback carries multicast, although its flag is missing.
            multicast = loopback or bool(flags & _MULTICAST)
            found.append(Link(name, index, tuple(addresses), loopback, multicast))
    return found


def _flags(any_socket: socket.socket, name: str) -> int:
    try:
        asked = struct.pack("16s24x", name.encode())
        answer = fcntl.ioctl(any_socket, _SIOCGIFFLAGS, asked)
    except OSError:  # it has just gone
        return 0
    return int.from_bytes(answer[16:18], sys.byteorder)


def covered(host: str, found: Sequence[Link]) -> list[tuple[Link, tuple[Own, ...]]]:
    """The links on which a server that listens on ``host`` is reached, each with the addresses at
    which it is. Raises OSError for a host that has no address."""
    host = bare(host)
    if host in EVERYWHERE:
        return [(link, link.addresses) for link in found]
    chosen: list[tuple[Own, ...]]
    if host == "0.0.0.0":
        chosen = [tuple(own for own in link.addresses if own.version == 4) for link in found]
    else:
        numbers = {address.host for address in resolve(host, 0)}
        chosen = [tuple(_among(numbers, link)) for link in found]
    return [(link, addresses) for link, addresses in zip(found, chosen, strict=True) if addresses]


def _among(numbers: set[str], link: Link) -> Sequence[Own]:
    """The link's addresses that have one of these names; all of 127.0.0.0/8 is the loopback's."""
    if link.loopback:
        local = [ipaddress.ip_address(number) for number in sorted(numbers) if "%" not in number]
        return [ipaddress.ip_interface(number) for number in local if number.is_loopback]
    return [own for own in link.addresses if numbers & {str(own.ip), f"{own.ip}%{link.name}"}]


def way_to(host: str, found: Sequence[Link]) -> tuple[Link, bool] | None:
    """The link through which the system would send to a numeric address, and whether the address
    is in a network of the link's, and not behind a router; None where no way leads there.

    Nothing is sent for that.
    """
    number = ipaddress.ip_address(host)
    family = socket.AF_INET if number.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as any_socket:
            any_socket.connect((host, 9))
            here = ipaddress.ip_address(any_socket.getsockname()[0])
    except OSError:
        return None
    for link in found:
        if here in (own.ip for own in link.addresses):
            return link, any(number in own.network for own in link.addresses)
    return None
