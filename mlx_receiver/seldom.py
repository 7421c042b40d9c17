"""Log lines that a peer can cause: some, not as many as it likes."""

from __future__ import annotations

import logging
import threading
import time
from typing import Final

_LINES: Final = 20
_SECONDS: Final = 10.0


class SeldomLogger:
    """Warnings of one kind: at most 20 in 10 s; the next one says how many were left out."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._lock = threading.Lock()
        self._since = 0.0
        self._lines = 0

    def warning(self, message: str, *arguments: object) -> None:
        """``Logger.warning``, or nothing."""
        with self._lock:
            now = time.monotonic()
            left_out = 0
            if now - self._since > _SECONDS:
                left_out = max(0, self._lines - _LINES)
                self._since, self._lines = now, 0
            self._lines += 1
            if self._lines > _LINES:
                return
        if left_out:
            self._logger.warning("%d further lines like the next were left out", left_out)
        self._logger.warning(message, *arguments)
