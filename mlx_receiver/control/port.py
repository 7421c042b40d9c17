"""The control port: a ROUTER that only those who may connect can talk to."""

from __future__ import annotations

import ctypes
import os
import secrets
import socket
from typing import Final

import zmq

from mlx_receiver.control.credentials import Credentials
from mlx_receiver.control.guard import Guard
from mlx_receiver.settings import SettingsError
from mlx_receiver.wire import addresses

#: Messages of one connection that libzmq keeps beside those that were taken, in either direction.
_MAX_KEPT: Final = 32
_LINGER_MS: Final = 500


def open_port(
    context: zmq.Context[zmq.Socket[bytes]], credentials: Credentials, max_message: int
) -> tuple[zmq.Socket[bytes], Guard]:
    """A socket and its guard, not bound yet. Messages of over ``max_message`` bytes end their
    connection."""
    # A ROUTER numbers its connections from C's ``rand()``. A peer that knows the next number
    # and takes it for its own name ends the process with a failed assertion in libzmq.
    ctypes.CDLL(None).srand(secrets.randbits(32))
    router = context.socket(zmq.ROUTER)
    guard = Guard(router, credentials)
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)
    router.maxmsgsize = max_message
    router.sndhwm = router.rcvhwm = _MAX_KEPT
    router.setsockopt(zmq.LINGER, _LINGER_MS)
    return router, guard


def bind(router: zmq.Socket[bytes], host: str, port: int) -> int:
    """Listen; the port, also where 0 was asked for. Raises SettingsError when it cannot."""
    try:
        return _bind(router, host, port)
    except OSError as error:
        raise SettingsError(
            f"the control port {addresses.spelled(host, port)} cannot be used "
            f"({os.strerror(error.errno or 0)}): choose another with --port"
        ) from None


def _bind(router: zmq.Socket[bytes], host: str, port: int) -> int:
    """Every address of the host, on one port. Raises OSError."""
    # Plain sockets find out which addresses are there and, for 0, which port all have free.
    probes = addresses.listening(host, port)
    port = probes[0].getsockname()[1]
    found = [(probe.family, probe.getsockname()) for probe in probes]
    for probe in probes:
        probe.close()
    for family, sockaddr in found:
        router.setsockopt(zmq.IPV6, int(family == socket.AF_INET6))
        at = addresses.Address(family, sockaddr).text
        # With IPv6 on, "*" is both versions.
        everywhere = addresses.bare(host) in addresses.EVERYWHERE
        router.bind(f"tcp://*:{port}" if everywhere else f"tcp://{at}")
    return port
