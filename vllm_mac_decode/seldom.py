"""What a peer can cause as often as it likes is logged now and then, and counted."""

from __future__ import annotations

import logging
import threading
import time
from typing import Final

_APART: Final = 2.0
_LONGEST: Final = 400


class Seldom:
    """Warnings of one kind: one every two seconds, with the number left out. Thread-safe."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._lock = threading.Lock()
        self._next = 0.0
        self._unsaid = 0

    def warn(self, text: str) -> None:
        """Log it, unless another was logged just before."""
        now = time.monotonic()
        with self._lock:
            if now < self._next:
                self._unsaid += 1
                return
            unsaid, self._unsaid, self._next = self._unsaid, 0, now + _APART
        self._logger.warning("%s%s", text, f" (and {unsaid} more like it)" if unsaid else "")


def printable(text: str) -> str:
    """A peer's words on one line of a log, and not too many of them."""
    line = "".join(c if c.isprintable() else " " for c in text[:_LONGEST])
    return line + "…" if len(text) > _LONGEST else line
