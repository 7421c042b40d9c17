"""When a profile is measured once more, although nothing contradicts it.

A machine that had other work while it was measured seems slow, gets no requests for that, and
nothing tells that it is not. So every profile is measured again: soon after the first time, then
more and more seldom while the same comes of it.
"""

from __future__ import annotations

from typing import Final

from mlx_receiver.planning.live import alike
from mlx_receiver.wire.profile import Profile

#: Seconds until the first time, and at the most.
SECONDS: Final = (3600.0, 86400.0)


class Review:
    """Of one side's profile. Every ``now`` is of one clock that does not go back."""

    def __init__(self) -> None:
        self._pause = SECONDS[0]
        self._at: float | None = None

    def due(self, now: float) -> bool:
        """Whether it is to be measured again. The first call is taken for the time at which the
        last measurement ended."""
        return self.left(now) <= 0

    def left(self, now: float) -> float:
        """Seconds until then."""
        if self._at is None:
            self._at = now + self._pause
        return self._at - now

    def begin(self) -> None:
        """It is being measured: the next pause begins with the next question."""
        self._at, self._pause = None, min(2 * self._pause, SECONDS[1])

    def found(self, profile: Profile, before: Profile | None) -> None:
        """What came of it. Where that is something else, one of the two was not true."""
        if not alike(profile, before):
            self._pause = SECONDS[0]
