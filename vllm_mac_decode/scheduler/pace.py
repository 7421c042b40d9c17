"""How fast a receiver decodes, as the arrival of its steps shows it."""

from __future__ import annotations

from typing import Final

from mlx_receiver.planning.live import Estimate

#: Steps in a row, of the same texts, that one figure is the mean of: they may arrive in bursts.
_STEPS: Final = 8
#: Seconds without a step after which something else than decoding took the time.
_PAUSE: Final = 2.0


class Pace:
    """Of one receiver's steps."""

    def __init__(self) -> None:
        self._rows = self._steps = self._tokens = self._contexts = 0
        self._began = self._last = 0.0

    def step(
        self, sessions: int, others: int, tokens: int, context: int, now: float, into: Estimate
    ) -> None:
        """A step of ``sessions`` texts with ``context`` tokens each brought ``tokens``, beside
        ``others``' texts."""
        rows = sessions + others
        if rows != self._rows or now - self._last > _PAUSE or not sessions:
            self._begin(rows, now)
            return
        self._last = now
        self._steps += 1
        self._tokens += tokens
        self._contexts += context
        if self._steps >= _STEPS:
            each = self._tokens / sessions
            if each > 0 and now > self._began:
                mean = self._contexts // self._steps
                into.observe_decode(mean, rows, (now - self._began) / each, now)
            self._begin(rows, now)

    def _begin(self, rows: int, now: float) -> None:
        self._rows, self._steps, self._tokens, self._contexts = rows, 0, 0, 0
        self._began = self._last = now
