"""Whether one connection is what holds the export up, so that a second one would help."""

from __future__ import annotations

from typing import Final

#: Bytes over which a connection is judged: many times what the two kernels' buffers hold.
WINDOW_BYTES: Final = 128 << 20

#: Bytes a second above which it is not the link that limits a connection, but the threads on both
#: sides of it: 25 Gbit/s Ethernet carries 3.1e9, one connection over loopback 4.5e9 to 5.5e9.
FAST: Final = 3.3e9


class Bottleneck:
    """Judges one connection's sends. For one thread."""

    def __init__(self) -> None:
        self._bytes, self._seconds = 0, 0.0

    def sent(self, nbytes: int, seconds: float, waiting: bool) -> bool:
        """Note that a send of ``nbytes`` took that long; ``waiting``: more was to be sent then.

        True if the connection was busy all the time, and as fast as one gets: on a slower link a
        second one would only cost processor time.
        """
        if not waiting:
            self._bytes, self._seconds = 0, 0.0
            return False
        self._bytes += nbytes
        self._seconds += seconds
        if self._bytes < WINDOW_BYTES:
            return False
        fast = self._bytes > FAST * self._seconds
        self._bytes, self._seconds = 0, 0.0
        return fast
