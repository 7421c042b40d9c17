"""Hosts and their addresses: a name has several, of both IP versions."""

from __future__ import annotations

import errno
import ipaddress
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

#: Hosts that mean every address of both IP versions; "0.0.0.0" means every one of version 4.
EVERYWHERE: Final = ("", "*", "::")

_BACKLOG: Final = 128

#: How often a port is chosen anew that one address of a name has free and another has not.
_TRIES: Final = 16

#: What says that an address is not there on this machine.
_NOT_HERE: Final = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Address:
    """One address of a host, as ``socket`` wants it."""

    family: int
    sockaddr: Any

    @property
    def host(self) -> str:
        """The numeric host, with its scope where it has one: ``fe80::1%en0``."""
        host = str(self.sockaddr[0])
        scope = self.sockaddr[3] if len(self.sockaddr) > 3 else 0
        return f"{host}%{socket.if_indextoname(scope)}" if scope and "%" not in host else host

    @property
    def text(self) -> str:
        """``host:port``."""
        return spelled(self.host, self.sockaddr[1])


def bare(host: str) -> str:
    """The host without the brackets that IPv6 addresses have in URLs."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def spelled(host: str, port: int) -> str:
    """``host:port``, with brackets around an IPv6 address."""
    host = bare(host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def announced(host: str) -> str:
    """The host as an ``Endpoint`` says it: an unspecified one is empty, "the control channel's"."""
    host = bare(host)
    return "" if host in (*EVERYWHERE, "0.0.0.0") else host


def is_this_machine(host: str) -> bool:
    """Whether a peer's numeric address is a loopback one, also as a socket of both IP versions
    spells it (``::ffff:127.0.0.1``)."""
    try:
        found = ipaddress.ip_address(bare(host).partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None)
    return bool((mapped or found).is_loopback)


def resolve(host: str, port: int) -> list[Address]:
    """Every address of the host, the system's favourite first. Raises OSError."""
    found = socket.getaddrinfo(bare(host), port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(Address(family, sockaddr) for family, _, _, _, sockaddr in found))


def try_each(host: str, port: int, timeout: float, attempt: Callable[[Address, float], _T]) -> _T:
    """What ``attempt`` returns for the first of the host's addresses where it raises no OSError.

    ``attempt`` gets the address and the moment (monotonic) by which to be done; all of them
    together have ``timeout`` seconds. Raises OSError: the address's own if there is one only, else
    with every address's reason.
    """
    end = time.monotonic() + timeout
    found = resolve(host, port)
    failures: list[OSError] = []
    for left, address in zip(range(len(found), 0, -1), found, strict=True):
        now = time.monotonic()
        try:
            return attempt(address, now + max(end - now, 0.01) / left)
        except OSError as error:
            failures.append(error)
    if len(failures) == 1:
        raise failures[0]
    raise OSError("; ".join(map(str, failures)))


def listening(host: str, port: int) -> list[socket.socket]:
    """Listening sockets, with one port, for every address of the host.

    ``EVERYWHERE`` is one socket of both IP versions. Addresses of a name that this machine has not
    got are left out. Raises OSError when none is left, or for a port in use.
    """
    host = bare(host)
    if host in EVERYWHERE:
        if socket.has_dualstack_ipv6():
            server = socket.create_server(
                ("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG
            )
            return [server]
        host = "0.0.0.0"
    found = resolve(host, port)
    for tries_left in range(_TRIES - 1, -1, -1):
        try:
            return _bind(found, port)
        except OSError as error:
            if port or error.errno != errno.EADDRINUSE or not tries_left:
                raise
    raise AssertionError


def _bind(found: list[Address], port: int) -> list[socket.socket]:
    """Sockets on one port, for ``port`` 0 whichever the first address has free."""
    servers: list[socket.socket] = []
    missing: OSError | None = None
    for address in found:
        sockaddr = (address.sockaddr[0], port, *address.sockaddr[2:])
        try:
            server = socket.create_server(sockaddr, family=address.family, backlog=_BACKLOG)
        except OSError as error:
            if error.errno in _NOT_HERE:
                missing = error
                continue
            for server in servers:
                server.close()
            raise
        servers.append(server)
        port = server.getsockname()[1]
    if not servers:
        raise missing or OSError("the host has no address")
    return servers
