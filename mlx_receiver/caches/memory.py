"""The memory budget: bytes that sessions and jobs may take, and who holds them until when."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final, Protocol

from mlx_receiver.caches.model import ModelCache
from mlx_receiver.wire.messages import E_CAPACITY, WireError

#: Tokens of decoded text that there is room for from the start. Beyond them the cache grows as
#: mlx-lm's does, by copying; reserving ``max_tokens`` would refuse most clients, which ask for all
#: that the context allows.
HEADROOM: Final = 512

#: What a prompt's token takes as a Python integer in this receiver's and mlx-lm's lists.
_LISTED_BYTES: Final = 64


class Kept(Protocol):
    """What takes memory only while nobody else needs it."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, at most."""

    def reclaim(self) -> bool:
        """Give some of it back; False when there is nothing left."""


class Budget:
    """Bytes for KV and for what grows with a prompt beside it. Thread-safe.

    What is bounded by a constant (a session's block times, say) is not counted.
    """

    def __init__(self) -> None:
        """Nothing fits until ``configure``."""
        self._cache: ModelCache | None = None
        self._itemsize = 0
        self._lock = threading.Lock()
        #: Bytes that sessions and jobs have taken, of all that there are.
        self.reserved = self.total = 0
        #: Bytes of messages that wait for slow clients.
        self.queued = 0
        #: What may be given up when there is no room.
        self.kept: Kept | None = None
        #: Told, by any thread, that something did not fit: what was borrowed is wanted back.
        self.short: Callable[[], None] | None = None

    def configure(self, cache: ModelCache, total: int) -> None:
        """What is known once the model is loaded."""
        self._cache = cache
        self._itemsize = cache.layout.itemsize
        self.total = total

    @property
    def free(self) -> int:
        """Bytes that are left."""
        return max(0, self.total - self.reserved - self.queued)

    def reserve(
        self,
        tokens: int,
        output_tokens: int,
        itemsize: int = 0,
        extra: int = 0,
        there: int = 0,
        spare: int = 0,
    ) -> Reservation:
        """Memory for a prompt, the first of its output, and ``extra`` bytes beside them.

        ``itemsize`` is that of the numbers that arrive, ``there`` bytes are reserved already, and
        ``spare`` tokens more are to have room.
        Raises WireError (``capacity``).
        """
        width = max(self._itemsize, itemsize)
        extra += tokens * _LISTED_BYTES
        headroom = min(output_tokens, HEADROOM) + spare
        need = max(0, self._kv_bytes(tokens, headroom, width) - there) + extra
        reservation = Reservation(self, extra)
        if not reservation.take(need):
            raise WireError(
                E_CAPACITY,
                f"{tokens} tokens need {need >> 20} MiB of KV memory; "
                f"{self.free >> 20} of {self.total >> 20} MiB are free (--kv-memory)",
            )
        return reservation

    def borrow(self, nbytes: int) -> Reservation | None:
        """So many bytes for what nobody waits for: nothing makes room for it. None where they are
        not free."""
        if not self._add(nbytes):
            return None
        reservation = Reservation(self, 0)
        reservation.nbytes = nbytes
        return reservation

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of a cache of that many tokens while it is decoded from."""
        return self._kv_bytes(tokens, 0, self._itemsize)

    def _kv_bytes(self, tokens: int, headroom: int, itemsize: int) -> int:
        return self._cache.nbytes(tokens, headroom, itemsize) if self._cache is not None else 0

    def add(self, nbytes: int) -> bool:
        """Take or, below 0, give back that many bytes; False, and nothing, if they do not fit."""
        while not self._add(nbytes):
            kept = self.kept
            if kept is None or nbytes > self.free + kept.nbytes or not kept.reclaim():
                if (short := self.short) is not None:  # who sets it may end meanwhile
                    short()
                return False
        return True

    def _add(self, nbytes: int) -> bool:
        with self._lock:
            if nbytes > 0 and self.reserved + self.queued + nbytes > self.total:
                return False
            self.reserved += nbytes
            return True


class Reservation:
    """Part of the budget, given back when its last holder lets go. Thread-safe.

    Whoever has the memory in hand holds it: a cancelled session's is free only once its blocks
    have stopped arriving and the batch has let its rows go.
    """

    def __init__(self, budget: Budget, extra: int) -> None:
        """Of 0 bytes, with one holder; ``extra`` are those beside K and V."""
        self._budget = budget
        self._extra = extra
        self._lock = threading.Lock()
        self._holders = 1
        self._finally: Callable[[], None] | None = None
        self.nbytes = 0

    def hold(self) -> bool:
        """Become another holder; False when the memory is free already."""
        with self._lock:
            if self._holders:
                self._holders += 1
            return self._holders > 0

    def release(self) -> None:
        """Be a holder no longer."""
        with self._lock:
            self._holders -= 1
            if not self._holders:
                self._budget.add(-self.nbytes)
                self.nbytes = 0
            last = not self._holders
        if last and self._finally is not None:
            self._finally()

    def finally_do(self, action: Callable[[], None] | None) -> None:
        """Let this be done when the last holder has let go, and nothing else."""
        self._finally = action

    def take(self, nbytes: int, beside: bool = False) -> bool:
        """Take that many more bytes, for K and V or ``beside`` them; False if they do not fit."""
        with self._lock:
            if not self._holders or not self._budget.add(nbytes):
                return False
            self.nbytes += nbytes
            self._extra += nbytes if beside else 0
            return True

    def give_back(self, nbytes: int) -> None:
        """Give back some of what was taken beside K and V, if that has not been done."""
        with self._lock:
            nbytes = min(nbytes, self._extra)
            if self._holders:
                self._budget.add(-nbytes)
                self.nbytes -= nbytes
                self._extra -= nbytes

    def resize(self, nbytes: int) -> bool:
        """Have exactly that many bytes; False, and what there was, if they do not fit."""
        with self._lock:
            more = nbytes - self.nbytes
            if not self._holders or not self._budget.add(more):
                return False
            self.nbytes, self._extra = nbytes, 0
            return True

    def absorb(self, other: Reservation) -> None:
        """Have what the other one has: it has nothing any more."""
        with other._lock:
            nbytes, other.nbytes = other.nbytes, 0
        with self._lock:
            if self._holders:
                self.nbytes += nbytes
            else:
                self._budget.add(-nbytes)

    def grow(self, tokens: int) -> bool:
        """Have room for a cache of that many tokens; False when they do not fit."""
        missing = self._budget.kv_bytes(tokens) + self._extra - self.nbytes
        return missing <= 0 or self.take(missing)
