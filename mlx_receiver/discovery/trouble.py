"""What keeps discovery from working: said once in the log, when it has lasted."""

from __future__ import annotations

import logging
import time
from typing import Final

#: Seconds that a link has to come up, and an announcement to be heard.
PATIENCE_SECONDS: Final = 4.0


class Trouble:
    """One side's. ``text`` is "" while discovery works."""

    def __init__(self, logger: logging.Logger, message: str) -> None:
        """``message`` has a ``%s`` for the reason, and says what to do."""
        self.text = ""
        self._logger = logger
        self._message = message
        self._since: float | None = None
        self._said = False

    def lasts(self, reason: str) -> None:
        """How it is now: ``reason`` is "" where all is well."""
        now = time.monotonic()
        if not reason:
            self.text, self._since = "", None
            return
        self._since = now if self._since is None else self._since
        if now - self._since >= PATIENCE_SECONDS:
            self.is_certain(reason)

    def is_certain(self, reason: str) -> None:
        """There is no need to wait."""
        self.text = reason
        if not self._said:
            self._said = True
            self._logger.warning(self._message, reason)
