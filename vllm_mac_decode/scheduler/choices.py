"""When to change one's mind: the last choice for each kind of requests stays, unless another one is
clearly better, or better by a margin for some requests in a row."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

#: By how much another choice must be faster for several requests in a row before it takes the
#: place of the last one, and by how much to do so at once. In between, the gains of those requests
#: multiplied must be as much, so that what is better by little takes PATIENCE of them.
MARGIN: Final = 1.08
CLEAR: Final = 1.2
PATIENCE: Final = math.ceil(math.log(CLEAR) / math.log(MARGIN))

#: What is faster by no more than this is as fast.
EQUAL: Final = 1.02

#: Seconds after which the last choice is no reason any more.
_STALE_SECONDS: Final = 300.0

#: Kinds of requests whose last choice is remembered.
_MOST_KINDS: Final = 256

_Choice = TypeVar("_Choice", bound=Hashable)


@dataclass(slots=True)
class _Kept(Generic[_Choice]):
    """The last choice for one kind of requests."""

    choice: _Choice
    at: float
    #: By how much others were better for the last requests, multiplied.
    doubt: float = 1.0


class Choices(Generic[_Choice]):
    """For one thread at a time."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, _Kept[_Choice]] = {}

    def settle(
        self,
        kind: Hashable,
        best: _Choice,
        totals: Mapping[_Choice, float],
        now: float,
        in_vain: Callable[[_Choice], bool],
    ) -> _Choice:
        """For a request of that kind, ``best`` or what was chosen for the last one. ``totals`` are
        the seconds of each; ``in_vain``: that choice is to be left at once."""
        kept = self._kept.pop(kind, None)
        if kept is None or now - kept.at > _STALE_SECONDS or kept.choice not in totals:
            kept = _Kept(best, now)
        least = min(totals.values())
        gain = totals[kept.choice] / least if least > 0 else 1.0
        kept.doubt = kept.doubt * gain if gain > MARGIN and kept.choice != best else 1.0
        if kept.choice != best and (kept.doubt >= CLEAR or in_vain(kept.choice)):
            kept = _Kept(best, now)
        kept.at = now
        self._kept[kind] = kept  # the latest last
        while len(self._kept) > _MOST_KINDS:
            del self._kept[next(iter(self._kept))]
        return kept.choice
