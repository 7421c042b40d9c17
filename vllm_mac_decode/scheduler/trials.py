"""Which prompts vLLM is timed with, one after the other, and what is noted of the one that it has.

Prompts grow until one step takes as long as somebody may have to wait for it; then one text goes
on in the prefix cache; then a few tokens are decoded, alone and together.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from vllm_mac_decode.scheduler.port import Machine

#: Seconds that a trial's step may take: a request that comes meanwhile waits for its end.
STEP_SECONDS: Final = 0.5
#: The shortest and the longest prompt; the text that goes on gets so long at the most, in so many
#: prompts.
_SHORTEST, _LONGEST, _GROWN, _PIECES = 8, 8192, 8192, 6
#: Times that each length is computed; the first one may compile something.
_EACH: Final = 2
#: Tokens that trials decode, and texts that they decode together.
_OUTPUT, _ROWS = 9, 4


@dataclass(frozen=True)
class Item:
    """What one trial does: prompts of ``tokens``, as many as ``rows``, ``output`` tokens of each.
    ``grown``: the beginning of the one long text."""

    tokens: int
    output: int = 1
    rows: int = 1
    grown: bool = False


@dataclass
class Asked:
    """The trial that vLLM has."""

    item: Item
    ids: list[str]
    since: float
    added: int = 0
    scheduled_at: float = 0.0
    cached: int = 0
    #: When a step brought tokens of every text, and how many of each.
    steps: list[tuple[float, float]] = field(default_factory=list)
    finished: set[str] = field(default_factory=set)


class Plan:
    """Which trial comes next, by what the ones before took."""

    def __init__(self, machine: Machine, grows: bool) -> None:
        """``grows``: a text can go on where its cache is."""
        self._machine = machine
        self._grows = grows
        self._most = min(machine.chunk, machine.max_tokens - _OUTPUT - 1, _LONGEST)
        self._length, self._left = min(_SHORTEST, self._most), _EACH + 1
        self._timed: tuple[int, float] | None = None  # the length before, and its seconds
        self._text = 0
        self._behind = self._decodes()

    def _decodes(self) -> list[Item]:
        rows = min(_ROWS, self._machine.rows)
        wanted = [Item(64, _OUTPUT), Item(64, _OUTPUT, rows), Item(512, _OUTPUT, rows)]
        return [item for item in wanted if item.tokens < self._machine.max_tokens - _OUTPUT]

    def next(self) -> Item | None:
        """The next one; None when there is none."""
        if self._most < 1:
            return None
        if self._left > 0:
            return Item(self._length)
        if self._grows and self._text + self._length <= self._longest_text:
            return Item(self._text + self._length, grown=True)
        if not self._behind:
            return None
        item = self._behind[0]
        if item.grown:
            return item
        # Of several prompts no more than what one step may have.
        tokens = min(item.tokens, max(1, max(self._length, 64) // item.rows))
        return replace(item, tokens=tokens)

    def done(self, seconds: float) -> None:
        """The next one has been done; its first step took so long."""
        if self._left > 0:
            self._left -= 1
            if self._left > 0:
                return
            for times in (4, 2):
                longer = min(times * self._length, self._most)
                if longer > self._length and self._expected(longer, seconds) <= STEP_SECONDS:
                    self._timed = self._length, seconds
                    self._length, self._left = longer, _EACH
                    return
        elif self._grows and (item := self.next()) is not None and item.grown:
            self._text = item.tokens
            if seconds > STEP_SECONDS or self._text + self._length > self._longest_text:
                self._stop_growing()
        elif self._behind:
            del self._behind[0]

    def _expected(self, longer: int, seconds: float) -> float:
        """Seconds of a longer prompt than the one that took so many."""
        each = seconds / self._length
        if self._timed is not None:
            length, before = self._timed
            each = max(each / 4, (seconds - before) / (self._length - length))
        return seconds + each * (longer - self._length)

    @property
    def _longest_text(self) -> int:
        most = min(_GROWN, self._machine.max_tokens - _OUTPUT - 1)
        return min(most, _PIECES * self._length)

    def skip(self) -> None:
        """The next one cannot be done: what is like it is left out, too."""
        if self._left > 0:
            self._left = 0
        elif self._grows:
            self._stop_growing()
        elif self._behind:
            del self._behind[0]

    def _stop_growing(self) -> None:
        self._grows = False
        if self._text:
            self._behind.insert(1, Item(self._text, _OUTPUT, grown=True))
