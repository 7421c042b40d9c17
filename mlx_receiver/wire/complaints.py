"""Warnings that a stranger can cause as often as he likes."""

from __future__ import annotations

import logging
import math
import threading
import time
from typing import Final

#: Seconds between two warnings; those in between are logged as DEBUG.
_APART: Final = 1.0


class Complaints:
    """Says why connections were closed, at most once a second: nobody may fill the log."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._lock = threading.Lock()
        self._next = -math.inf
        self._unsaid = 0

    def closed(self, peer: str, reason: object) -> None:
        """The connection from ``peer`` is closed for that reason. From any thread."""
        now = time.monotonic()
        with self._lock:
            if now < self._next:
                self._unsaid += 1
                level, more = logging.DEBUG, ""
            else:
                level, more = logging.WARNING, f" ({self._unsaid} others before)"
                more = more if self._unsaid else ""
                self._next, self._unsaid = now + _APART, 0
        self._logger.log(level, "bulk connection from %s closed: %s%s", peer, reason, more)
