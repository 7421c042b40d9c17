"""A circuit breaker: a receiver that keeps failing is left alone for a while."""

from __future__ import annotations

FAILURES = 3
WINDOW_SECONDS = 30.0
PAUSE_SECONDS = (2.0, 60.0)


class CircuitBreaker:
    """Open after FAILURES failures within WINDOW_SECONDS, each time for twice as long.

    Times are ``time.monotonic()`` seconds, given by the caller.
    """

    def __init__(self) -> None:
        self._failures: list[float] = []
        self._closed_from = 0.0
        self._pause = PAUSE_SECONDS[0]

    def is_open(self, now: float) -> bool:
        """Whether nothing may be handed off at the moment."""
        return now < self._closed_from

    def failed(self, now: float) -> float:
        """Note a failure; the seconds for which it opened the circuit, or 0."""
        self._failures = [t for t in self._failures if now - t < WINDOW_SECONDS] + [now]
        if len(self._failures) < FAILURES or self.is_open(now):
            return 0.0
        pause = self._pause
        self._failures, self._closed_from = [], now + pause
        self._pause = min(2 * pause, PAUSE_SECONDS[1])
        return pause

    def succeeded(self) -> None:
        """A hand-off went well to its end: the next pause is the shortest again."""
        self._pause = PAUSE_SECONDS[0]
