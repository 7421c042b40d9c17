"""Who may use the time between two decode steps, and how much of it.

Running responses wait meanwhile. So all that is done between two steps shares one budget of
seconds, and whoever took longer than its part has less of the next ones.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

#: Seconds between two steps for everything together. What cannot be divided is finished: a layer
#: that is copied, the shortest chunk of a prompt.
GAP_SECONDS: Final = 0.15

#: Who shares it: copies of what is decoded, fronts, prompts that the batch prefills, and jobs that
#: join with a copy of what an earlier text left.
COPIES: Final = "copies"
FRONTS: Final = "fronts"
PROMPTS: Final = "prompts"
JOINS: Final = "joins"


class Turns:
    """The budget of one gap after the other.

    Each of those that want some gets an equal part of every gap. What it does not use is for those
    that come after it; what it could not use, since others came first, it has later, up to a whole
    gap. Who has waited for most comes first.
    """

    def __init__(self, seconds: float = GAP_SECONDS) -> None:
        self._gap = seconds
        #: What each may still use; below 0 after it took longer than it might.
        self._balance: dict[str, float] = {}
        #: Of this gap: what is for whoever has not had its turn yet, what was left by those who
        #: had, and what was used.
        self._granted: dict[str, float] = {}
        self._left_over = self._used = 0.0
        #: Less is not worth a turn: whatever cannot be divided would take longer.
        self._least = 0.0
        self._shared = False

    def begin(self, wanting: Collection[str], decoding: bool) -> None:
        """Another gap, and who wants some of it. Nobody waits where nothing is ``decoding``: each
        gets a whole one."""
        self._left_over = self._used = self._least = 0.0
        self._shared = decoding
        if not decoding or len(wanting) < 2:
            self._balance = {}
            self._granted = dict.fromkeys(wanting, self._gap)
            return
        part = self._gap / len(wanting)
        self._least = part / 2
        before = self._balance
        self._balance = {who: min(before.get(who, 0.0) + part, self._gap) for who in wanting}
        self._granted = {}
        left = self._gap
        for who in sorted(wanting, key=lambda who: -self._balance[who]):
            granted = min(self._balance[who], left)
            self._granted[who] = granted if granted >= self._least else 0.0
            left -= self._granted[who]

    def seconds(self, who: str) -> float:
        """That it may use now; 0 where it has to wait. One that has come since the gap began gets
        what the others do not."""
        if not self._shared:
            return self._gap
        left = max(0.0, self._gap - self._used)
        if who not in self._granted:
            return max(0.0, left - sum(self._granted.values()))
        seconds = min(self._granted[who] + self._left_over, left)
        return seconds if seconds >= self._least else 0.0

    def took(self, who: str, seconds: float) -> None:
        """It has had its turn, and used so many."""
        might, granted = self.seconds(who), self._granted.pop(who, None)
        self._used += seconds
        if granted is None:
            return
        others = min(self._left_over, max(0.0, seconds - granted))
        self._left_over += max(0.0, granted - seconds) - others
        if who in self._balance:
            # What it left is others' for good, or whoever uses nothing would always come first.
            # A debt is bounded: nobody waits for long after what could not be divided.
            paid = max(min(granted, might), seconds - others)
            self._balance[who] = max(self._balance[who] - paid, -self._gap)
