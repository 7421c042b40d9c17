"""What has been computed and leaves from its end, until it meets what the receiver computes."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from typing import Final, Generic, NamedTuple, TypeVar

#: Tokens of a piece, which leaves with all layers before the one in front of it. The receiver meets
#: pieces, so that half of one is sent in vain; smaller ones cost more frames.
PIECE_TOKENS: Final = 128

J = TypeVar("J")


class Piece(NamedTuple, Generic[J]):
    """Tokens ``low`` to ``high`` of a job. ``last``: nothing else of the job is left."""

    job: J
    low: int
    high: int
    last: bool


class FromEnd(Generic[J]):
    """Jobs of one layer and some tokens each, taken piece by piece. For one thread."""

    def __init__(self) -> None:
        #: By session; the next piece is the one with the last tokens, and of those the job that
        #: came first.
        self._heaps: dict[int, list[tuple[int, int, int, J]]] = {}
        self._number = itertools.count()

    def __bool__(self) -> bool:
        return bool(self._heaps)

    def add(self, session: int, job: J, low: int, high: int) -> None:
        """Let tokens ``low`` to ``high``, at least one, of the session's job leave."""
        heap = self._heaps.setdefault(session, [])
        heapq.heappush(heap, (-high, next(self._number), low, job))

    def take(self) -> Piece[J]:
        """The next piece, of the session that came first."""
        session, heap = next(iter(self._heaps.items()))
        end, number, low, job = heap[0]
        high = -end
        start = max(low, (high - 1) // PIECE_TOKENS * PIECE_TOKENS)
        if start > low:
            heapq.heapreplace(heap, (-start, number, low, job))
        else:
            heapq.heappop(heap)
            if not heap:
                del self._heaps[session]
        return Piece(job, start, high, start == low)

    def drop(self, session: int) -> Sequence[J]:
        """The session's jobs, of which nothing is taken any more."""
        return [job for *_, job in self._heaps.pop(session, ())]
