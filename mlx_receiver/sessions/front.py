"""One session whose KV the receiver computes from the front, while vLLM's comes from the end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Final

import mlx.core as mx
import numpy as np

from mlx_receiver.caches.adapter import CARRIERS
from mlx_receiver.caches.memory import Budget, Reservation
from mlx_receiver.caches.model import CacheBuffers, ModelCache
from mlx_receiver.decode.fronts import LEAST_CHUNK, Chunk
from mlx_receiver.metrics import Metrics
from mlx_receiver.sessions.session import Phase, Session
from mlx_receiver.wire.layout import ITEMSIZE
from mlx_receiver.wire.messages import E_CAPACITY, WireError

#: Tokens that there is room for when computing begins. Zeroing memory takes a while, and what is
#: behind the tokens where the two meet is never written.
_ROOM: Final = 8192

#: Seconds of arriving that say how fast KV comes.
_TIMED: Final = 0.05


def computable(session: Session, cache: ModelCache) -> bool:
    """Whether the model's own KV can stand beside what arrives: each part has a row of every token,
    in the numbers that are decoded from. A proof compares the two: it wants vLLM's alone.
    """
    return (
        session.compute == "front"
        and not session.proof
        and session.layout.every_token
        and cache.resumes(session.layout)
    )


class Front:
    """See ``decode.fronts.Front``. All but ``wanted`` is called on the decoding thread.

    The model computes into a cache of its own, since the session's is written by others; each
    chunk's rows are copied from there. Where the next tokens have arrived already, computing goes
    on behind them, with a cache that is made anew of what the session has.

    That cache takes memory as it grows, and like a session's: of what earlier texts left, what was
    used longest ago makes room for it. Where there is none left, vLLM sends the rest.
    """

    def __init__(
        self,
        session: Session,
        cache: ModelCache,
        budget: Budget,
        metrics: Metrics,
        complete: Callable[[Session], None],
    ) -> None:
        """``complete`` is called when the session is, by what was computed last."""
        self._session = session
        self._cache = cache
        self._budget = budget
        self._metrics = metrics
        self._complete = complete
        self._reservation: Reservation | None = None
        self._caches: list[Any] = []
        #: Other caches that are being made: of how many tokens, and the layers that have them.
        self._making: tuple[int, CacheBuffers] | None = None
        self._copied = 0
        #: Tokens that the caches hold and have room for, and those that were copied or came.
        self._tokens = self._room = self._put = 0

    @property
    def wanted(self) -> bool:
        return self._session.phase is Phase.RECEIVING

    def next(self, most: int, rate: float, seconds: float) -> Chunk | None:
        session, until = self._session, time.perf_counter() + seconds
        # The session's memory may still be on its way: the first tokens need not wait for it.
        if self._put < self._tokens and session.allocated:
            self._hand_over()
        gap = session.gap(self._tokens, min(most, self._share(rate)))
        if gap is None:
            waits = self.wanted and self._put < self._tokens
            return Chunk([], []) if waits else None
        start, end = gap
        if start != self._tokens or end > self._room or self._making is not None:
            # Where a block was arriving nothing was put: its rows are read when they are there.
            if start and not (session.allocated and session.gap(0, 1) == (start, start + 1)):
                return Chunk([], [])
            if not self._remake(start, end, until):
                return None
            if self._making is not None:
                return Chunk([], [])
        return Chunk(session.prompt_token_ids[start:end], self._caches)

    def computed(self, tokens: int) -> None:
        self._tokens += tokens
        if self._session.allocated:
            self._hand_over()

    def close(self) -> None:
        self._caches, self._making = [], None
        reservation, self._reservation = self._reservation, None
        if reservation is not None:
            reservation.release()

    # --- inside -----------------------------------------------------------------------------

    def _hand_over(self) -> None:
        """Copy what was computed into the session's memory."""
        session, start, end = self._session, self._put, self._tokens
        self._put = end
        arrays = [
            [
                array[:, start:end].view(CARRIERS[ITEMSIZE[part.dtype]])
                for part, array in zip(
                    layer.parts, self._cache.parts(index, self._caches[index], end), strict=True
                )
            ]
            for index, layer in enumerate(self._cache.layout.layers)
        ]
        mx.eval(arrays)
        before = session.computed_bytes
        if not session.reservation.hold():
            return  # it has ended
        try:
            # The views are gone before the model writes into the arrays again.
            session.put(
                start, end, [[np.array(array, copy=False) for array in of] for of in arrays]
            )
        finally:
            session.reservation.release()
        self._metrics.computed_bytes.inc(session.computed_bytes - before)
        if session.completed():
            self._complete(session)

    def _share(self, rate: float) -> int:
        """Of the tokens that are missing, those that are computed by the time at which the others
        have arrived: a chunk that ends later would be computed in vain."""
        session = self._session
        blocks = session.timeline.blocks
        seconds = (time.monotonic_ns() - blocks[0].arrived_ns) / 1e9 if blocks else 0.0
        a_token = session.layout.bytes_per_token
        missing = session.missing_bytes / a_token
        if rate and seconds > _TIMED:
            missing *= rate / (rate + session.kv_bytes / a_token / seconds)
        return max(LEAST_CHUNK, math.ceil(missing))

    def _reserve(self, tokens: int) -> None:
        """Have memory for a cache of that many. Raises WireError where there is none."""
        if self._reservation is None:
            self._reservation = self._budget.reserve(tokens, 0)
        elif not self._reservation.grow(tokens):
            raise WireError(E_CAPACITY, f"no memory to compute more than {self._tokens} tokens in")

    def _remake(self, start: int, end: int, until: float) -> bool:
        """Have a cache of the session's first ``start`` tokens, with room for more, or a part of
        it: running responses do not wait for the rest. False when the session has ended. Raises
        WireError where there is no memory."""
        session = self._session
        if self._making is None or self._making[0] != start:
            # There need not be memory for both.
            self._caches, self._making, self._copied = [], None, 0
            self._room = min(max(2 * start, start + _ROOM, end), session.tokens)
            self._reserve(self._room)
            buffers = self._cache.allocate(self._cache.layout, start, self._room - start)
            self._making = start, buffers
        _, buffers = self._making
        if not session.reservation.hold():
            return False
        try:
            while self._copied < buffers.layers or buffers.grow():
                if start and not session.read(start, self._copied, buffers):
                    return False
                self._copied += 1
                if time.perf_counter() > until:
                    return True
        finally:
            session.reservation.release()
        self._caches, self._tokens, self._put = buffers.build(), start, start
        self._making = None
        return True
