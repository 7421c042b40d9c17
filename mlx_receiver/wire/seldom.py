"""What a peer can cause as often as it likes is logged now and then, and counted."""

from __future__ import annotations

import logging
import math
import threading
import time
from typing import Final

#: Seconds between two warnings of one kind; those in between are logged as DEBUG.
_APART: Final = 1.0
_LONGEST: Final = 400


class Seldom:
    """Warnings of one kind: one a second, with the number of those left out. Thread-safe."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._lock = threading.Lock()
        self._next = -math.inf
        self._unsaid = 0

    def warning(self, message: str, *arguments: object) -> None:
        """``Logger.warning``, unless another was logged just before."""
        now = time.monotonic()
        with self._lock:
            if now < self._next:
                self._unsaid += 1
                level, more = logging.DEBUG, ""
            else:
                level, more = logging.WARNING, f" (and {self._unsaid} more like it)"
                more = more if self._unsaid else ""
                self._next, self._unsaid = now + _APART, 0
        self._logger.log(level, f"{message}%s", *arguments, more)


def printable(text: str) -> str:
    """A peer's words on one line of a log, and not too many of them."""
    line = "".join(c if c.isprintable() else " " for c in text[:_LONGEST])
    return line + "…" if len(text) > _LONGEST else line
