"""The memory budget: bytes that sessions and jobs may take, and who holds them until when."""

from __future__ import annotations

import threading
from typing import Final

from mlx_receiver.caches.model import ModelCache
from mlx_receiver.wire.messages import E_CAPACITY, WireError

#: Tokens of decoded text that there is room for from the start. Beyond them the cache grows as
#: mlx-lm's does, by copying; reserving ``max_tokens`` would refuse most clients, which ask for all
#: that the context allows.
HEADROOM: Final = 512

#: What a prompt's token takes as a Python integer in this receiver's and mlx-lm's lists.
_LISTED_BYTES: Final = 64


class Budget:
    """Bytes for KV and for what grows with a prompt beside it. Thread-safe.

    What is bounded by a constant (a session's block times, say) is not counted.
    """

    def __init__(self) -> None:
        """Nothing fits until ``configure``."""
        self._cache: ModelCache | None = None
        self._itemsize = 0
        self._lock = threading.Lock()
        self._reserved = 0
        self.total = 0
        #: Bytes of messages that wait for slow clients.
        self.queued = 0

    def configure(self, cache: ModelCache, total: int) -> None:
        """What is known once the model is loaded."""
        self._cache = cache
        self._itemsize = cache.layout.itemsize
        self.total = total

    @property
    def reserved(self) -> int:
        """Bytes that sessions and jobs have taken."""
        return self._reserved

    @property
    def free(self) -> int:
        """Bytes that are left."""
        return max(0, self.total - self._reserved - self.queued)

    def reserve(
        self, tokens: int, output_tokens: int, itemsize: int = 0, extra: int = 0
    ) -> Reservation:
        """Memory for a prompt, the first of its output, and ``extra`` bytes beside them.

        ``itemsize`` is that of the numbers that arrive. Raises WireError (``capacity``).
        """
        width = max(self._itemsize, itemsize)
        extra += tokens * _LISTED_BYTES
        need = self._kv_bytes(tokens, min(output_tokens, HEADROOM), width) + extra
        reservation = Reservation(self, extra)
        if not reservation.take(need):
            raise WireError(
                E_CAPACITY,
                f"{tokens} tokens need {need >> 20} MiB of KV memory; "
                f"{self.free >> 20} of {self.total >> 20} MiB are free (--kv-memory)",
            )
        return reservation

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of a cache of that many tokens while it is decoded from."""
        return self._kv_bytes(tokens, 0, self._itemsize)

    def _kv_bytes(self, tokens: int, headroom: int, itemsize: int) -> int:
        return self._cache.nbytes(tokens, headroom, itemsize) if self._cache is not None else 0

    def add(self, nbytes: int) -> bool:
        """Take or, below 0, give back that many bytes; False, and nothing, if they do not fit."""
        with self._lock:
            if nbytes > 0 and self._reserved + self.queued + nbytes > self.total:
                return False
            self._reserved += nbytes
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

    def take(self, nbytes: int, beside: bool = False) -> bool:
        """Take that many more bytes, for K and V or ``beside`` them; False if they do not fit."""
        with self._lock:
            if not self._holders or not self._budget.add(nbytes):
                return False
            self.nbytes += nbytes
            self._extra += nbytes if beside else 0
            return True

    def give_back(self, nbytes: int) -> None:
        """Give back some of what was taken beside K and V."""
        with self._lock:
            if self._holders:
                self._budget.add(-nbytes)
                self.nbytes -= nbytes
                self._extra -= nbytes

    def grow(self, tokens: int) -> bool:
        """Have room for a cache of that many tokens; False when they do not fit."""
        missing = self._budget.kv_bytes(tokens) + self._extra - self.nbytes
        return missing <= 0 or self.take(missing)
