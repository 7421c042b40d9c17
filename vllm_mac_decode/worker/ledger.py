"""The one answer to "may vLLM free these blocks?" in a worker."""

from __future__ import annotations

import threading
from collections import defaultdict


class BlockLedger:
    """Counts, for each request with blocks to be read, the layers that are still to be read.

    vLLM keeps a finished request's blocks until ``finished`` names it. Thread-safe: vLLM's thread
    announces and asks, the gathering threads read.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._unread: defaultdict[str, int] = defaultdict(int)
        self._waiting: set[str] = set()
        self._released = False

    def announce(self, request_id: str, reads: int) -> None:
        """Some of the request's blocks will be read that often; not at all in a worker that
        exports nothing, of which vLLM still waits to hear."""
        with self._lock:
            self._unread[request_id] += reads

    def read(self, request_id: str) -> None:
        """One of those reads has been done, or will never be wanted."""
        with self._lock:
            self._unread[request_id] -= 1

    def release(self) -> None:
        """Nothing is read any more: everything may be freed, now and later."""
        with self._lock:
            self._released = True

    def finished(self, request_ids: set[str]) -> set[str]:
        """Of these requests, and of earlier ones, those whose blocks have been read or given up."""
        with self._lock:
            self._waiting |= request_ids & self._unread.keys()
            done = {r for r in self._waiting if self._released or self._unread[r] <= 0}
            self._waiting -= done
            for request_id in done:
                del self._unread[request_id]
        return done
