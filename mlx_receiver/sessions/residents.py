"""Caches of texts that have ended, kept for prompts that begin like them: the next turn of a
conversation, another branch of it.

They lie in what live sessions leave of the memory budget and make room for them, the one that was
used longest ago first. What a text left is found only for prompts of the same partition: of the
same machine's key, the same weights and the same salt.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mlx_receiver.caches.memory import Reservation
from mlx_receiver.metrics import Metrics

#: Tokens that a prompt must share with a text: copying fewer saves less than it costs.
LEAST_TOKENS: Final = 16

#: A text that another one continues but for its last so many tokens, or this share of them, is not
#: kept beside it: they are how a turn ends, which the chat template may write in another way.
_ENDING: Final = 64
_ENDING_SHARE: Final = 8

#: The same for the text that the other one was made from, where only its answer differs: that comes
#: back in another way, or without its reasoning, and both would take twice the memory for one
#: conversation.
_ANSWER: Final = 512

#: Texts that are kept at most, however small they are: each is looked at for every prompt.
_MOST: Final = 1024

#: Seconds that a prompt waits for texts that have just ended: it takes the batch's next step.
_PATIENCE: Final = 0.25

Tokens = NDArray[np.int32]


@dataclass(slots=True, eq=False)
class Resident:
    """One text: its tokens, and a cache for each layer, which holds all of them."""

    partition: str
    tokens: Tokens
    caches: Sequence[Any]
    nbytes: int
    reservation: Reservation
    #: How many of its tokens were the prompt; the rest is the answer.
    prompt_tokens: int = 0
    #: Which one it is, from 1 on.
    number: int = field(default_factory=itertools.count(1).__next__)
    #: Who copies from it or continues it: it cannot make room.
    users: int = 0
    #: A session writes behind its last token, into its memory.
    lent: bool = False


@dataclass(slots=True, eq=False)
class Found:
    """What a prompt shares with a resident: its first ``tokens``. The resident's memory stays until
    this is released.

    Who is ``alone`` continues it in its own memory, and nobody else does.
    """

    resident: Resident
    caches: Sequence[Any]
    tokens: int
    alone: bool
    _let_go: Callable[[Found], None]
    _released: bool = field(default=False)

    def release(self) -> None:
        """Nothing of the resident is used any more. Safe to call more than once."""
        if not self._released:
            self._released = True
            self._let_go(self)


class Residents:
    """See the module's text. Thread-safe."""

    def __init__(self, metrics: Metrics, enabled: bool = True) -> None:
        self.enabled = enabled
        self._metrics = metrics
        self._lock = threading.Lock()
        #: The one that was used longest ago first.
        self._all: dict[Resident, None] = {}
        #: Bytes that they give back when sessions need them.
        self.nbytes = 0
        #: Texts of a partition that have just ended, whose caches are still in the batch.
        self._expected: Counter[str] = Counter()
        self._came = threading.Condition(self._lock)

    def expect(self, partition: str, more: int) -> None:
        """So many texts more (or, below 0, less) are about to be kept. Whoever has heard of a
        text's end may send the next turn before that."""
        with self._came:
            self._expected[partition] += more
            if not self._expected[partition]:
                del self._expected[partition]
            self._came.notify_all()

    def __len__(self) -> int:
        return len(self._all)

    def find(
        self,
        partition: str,
        prompt: Sequence[int],
        fits: Callable[[Sequence[Any]], bool],
        patient: bool = True,
    ) -> Found | None:
        """The resident that shares most of the prompt's beginning. ``fits``: whether the whole
        prompt has room in a resident's own memory; ``patient``: wait for what has just ended."""
        if not self.enabled:
            return None
        tokens = np.array(prompt, np.int32)
        with self._came:
            if patient:
                self._came.wait_for(lambda: not self._expected[partition], _PATIENCE)
        # Compared without the lock: one of them may be gone meanwhile.
        shared = [(common(r.tokens, tokens), r) for r in self._of(partition)]
        for same, best in sorted(shared, key=lambda pair: -pair[0]):
            if same < LEAST_TOKENS:
                return None
            with self._lock:
                if best not in self._all or not best.reservation.hold():
                    continue
                self._all[best] = self._all.pop(best)
                if not best.users:
                    self.nbytes -= best.nbytes
                best.users += 1
                alone = same == len(best.tokens) and not best.lent and fits(best.caches)
                best.lent = best.lent or alone
                return Found(best, best.caches, same, alone, self._return)
        return None

    def take(self, found: Found, reservation: Reservation) -> None:
        """Whoever continues it alone is about to decode: it is not there for others any more, and
        ``reservation`` covers its memory, too."""
        assert found.alone
        resident = found.resident
        with self._lock:
            copied = resident.users > 1
        # What others still copy from, MLX copies at the first step.
        if not copied or not reservation.take(resident.nbytes):
            reservation.absorb(resident.reservation)
        self._drop([resident])
        found.caches = ()
        found.release()

    def add(
        self,
        partition: str,
        tokens: Sequence[int],
        caches: Sequence[Any],
        nbytes: int,
        reservation: Reservation,
        prompt_tokens: int = 0,
        continued: int = 0,
    ) -> Resident | None:
        """Keep a text's caches of ``nbytes``, in memory that is reserved; None where that is not
        worth it. Its first ``prompt_tokens`` were asked, and ``continued`` is the number of the
        resident that it was made from."""
        if not self.enabled or len(tokens) < LEAST_TOKENS or not reservation.hold():
            return None
        its_tokens = np.array(tokens, np.int32)
        nbytes += its_tokens.nbytes
        new = Resident(partition, its_tokens, caches, nbytes, reservation, prompt_tokens)
        if not reservation.resize(nbytes):
            reservation.release()
            return None
        contained = [other for other in self._of(partition) if _contains(new, other, continued)]
        with self._lock:
            self._all[new] = None
            self.nbytes += nbytes
            contained += list(self._all)[: max(0, len(self._all) - _MOST)]
        self._drop(contained)
        return new

    def reclaim(self) -> bool:
        """Give up the one that was used longest ago; False when there is none."""
        with self._lock:
            oldest = next((resident for resident in self._all if not resident.users), None)
        if oldest is None:
            return False
        self._metrics.evicted.inc()
        self._drop([oldest])
        return True

    def close(self) -> None:
        """Keep nothing any more."""
        self.enabled = False
        with self._lock:
            everything = list(self._all)
        self._drop(everything)

    def _of(self, partition: str) -> list[Resident]:
        with self._lock:
            return [resident for resident in self._all if resident.partition == partition]

    def _drop(self, residents: Sequence[Resident]) -> None:
        with self._lock:
            gone = [resident for resident in residents if resident in self._all]
            for resident in gone:
                del self._all[resident]
                if not resident.users:
                    self.nbytes -= resident.nbytes
        for resident in gone:
            # Whoever still held the arrays would make MLX copy them at the next step.
            resident.caches = ()
            resident.reservation.release()

    def _return(self, found: Found) -> None:
        resident = found.resident
        with self._lock:
            resident.users -= 1
            if found.alone:
                resident.lent = False
            if not resident.users and resident in self._all:
                self.nbytes += resident.nbytes
        resident.reservation.release()


def common(one: Tokens, other: Tokens) -> int:
    """How many tokens both begin with."""
    length = min(len(one), len(other))
    # Most texts differ at once.
    if not np.array_equal(one[:LEAST_TOKENS], other[:LEAST_TOKENS]):
        length = min(length, LEAST_TOKENS)
    differ = one[:length] != other[:length]
    at = int(differ.argmax()) if length else 0
    return at if length and differ[at] else length


def _contains(new: Resident, other: Resident, continued: int) -> bool:
    """Whether the other text is not worth its memory beside this one, which was made from the
    ``continued`` one."""
    if other.lent:
        return False
    same = common(new.tokens, other.tokens)
    edited = other.number == continued and same >= other.prompt_tokens
    ending = _ANSWER if edited else _ENDING
    return len(other.tokens) - same <= min(ending, same // _ENDING_SHARE)
