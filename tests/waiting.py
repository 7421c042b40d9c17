"""For what comes through another thread or process."""

from __future__ import annotations

import time
from collections.abc import Callable


def eventually(condition: Callable[[], bool], seconds: float = 20.0, pause: float = 0.01) -> bool:
    """Whether the condition becomes true within that time, asked every ``pause`` seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(pause)
    return condition()
