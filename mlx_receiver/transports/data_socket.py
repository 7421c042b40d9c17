"""What both ends of a ``tcp`` data connection do with their socket.

Timeouts are the kernel's SO_SNDTIMEO: Python's ``settimeout`` would make the descriptor
non-blocking, on which MSG_WAITALL has no effect.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
from collections.abc import Sequence
from typing import Final

from mlx_receiver.transports.transport import TransportError

#: Bytes that must have come before Linux wakes a thread that reads a payload. Woken for every
#: packet, it would spend as much time on waking up as on copying.
_WAKE_BYTES: Final = 256 << 10 if sys.platform == "linux" else 0

#: A peer whose machine vanished is noticed after about 25 s of silence.
_KEEPALIVE: Final = {"TCP_KEEPIDLE": 10, "TCP_KEEPALIVE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}


def tune(sock: socket.socket) -> None:
    """The options of a data connection, on either side."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        option = getattr(socket, name, None)
        if option is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
    if sys.platform == "linux":
        # bbr, some systems' default, paces itself to half of what a cable between two machines
        # carries. reno needs no more than its tiny bandwidth-delay product, and any user may
        # choose it.
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")


def set_send_timeout(sock: socket.socket, seconds: float) -> None:
    """Have the kernel return from sending after that long."""
    value = struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)


def recv_into(sock: socket.socket, buffers: Sequence[memoryview]) -> bool:
    """Fill the buffers. False when the peer closed before the first byte.

    Raises TransportError when the connection breaks in between.
    """
    todo = [buffer for buffer in buffers if buffer.nbytes]
    started = False
    while todo:
        try:
            count = sock.recvmsg_into(todo, 0, socket.MSG_WAITALL)[0]
        except OSError as error:
            raise TransportError(f"the connection broke: {error}") from None
        if count == 0:
            if started:
                raise TransportError("the connection closed inside a frame")
            return False
        started = True
        advance(todo, count)
    return True


def advance(todo: list[memoryview], count: int) -> None:
    """Drop the first ``count`` bytes of the buffers."""
    while todo and count >= todo[0].nbytes:
        count -= todo.pop(0).nbytes
    if count:
        todo[0] = todo[0][count:]


def recv_payload(sock: socket.socket, buffers: Sequence[memoryview]) -> None:
    """Fill the buffers with a payload, waking up as seldom as that allows."""
    early = sum(buffer.nbytes for buffer in buffers) - _WAKE_BYTES
    if not _WAKE_BYTES or early < _WAKE_BYTES:
        _recv_rest(sock, buffers)
        return
    first, last = [], []
    for buffer in buffers:
        cut = min(max(early, 0), buffer.nbytes)
        first.append(buffer[:cut])
        last.append(buffer[cut:])
        early -= buffer.nbytes
    # While ``first`` is read, at least _WAKE_BYTES more of this payload are still to come: the
    # wait for them always ends.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, _WAKE_BYTES)
    _recv_rest(sock, first)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
    _recv_rest(sock, last)


def _recv_rest(sock: socket.socket, buffers: Sequence[memoryview]) -> None:
    """Fill the buffers with what follows a header."""
    if not recv_into(sock, buffers) and any(buffer.nbytes for buffer in buffers):
        raise TransportError("the connection closed inside a frame")
