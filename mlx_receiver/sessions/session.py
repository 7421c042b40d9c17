"""One request on the receiver: its memory, what of its cache has arrived, and when."""

from __future__ import annotations

import enum
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from mlx_receiver.caches.adapter import Rows
from mlx_receiver.caches.memory import Reservation
from mlx_receiver.caches.model import CacheBuffers
from mlx_receiver.sessions.coverage import ABSENT, ARRIVING, RESIDENT, Coverage
from mlx_receiver.transports.transport import Landing
from mlx_receiver.wire.frames import Header
from mlx_receiver.wire.handoffs import BlockTimes
from mlx_receiver.wire.layout import ITEMSIZE, CacheLayout
from mlx_receiver.wire.messages import E_BLOCK, E_CAPACITY, E_SESSION, Code, Open, WireError

if TYPE_CHECKING:
    from mlx_receiver.decode.jobs import Job

#: Blocks whose times are kept per session; further ones are only counted.
MAX_TIMED_BLOCKS: Final = 4096

#: How long a duplicate waits, in seconds, for the block it duplicates to finish arriving.
_DUPLICATE_WAIT: Final = 10.0

#: How long a block waits, in seconds, for its layer to be allocated.
_ALLOCATE_WAIT: Final = 10.0


class Owner(Protocol):
    """Whose session it is: who opened it, or has claimed it since."""

    id: str  # DataTicket.client of whoever opened it


class Phase(enum.StrEnum):
    """Where a session is in its life."""

    RECEIVING = "receiving"
    #: Everything is there; whoever opened the session is being told.
    COMPLETE = "complete"
    #: They know, and it waits for the first token.
    WAITING = "waiting"
    DECODING = "decoding"
    ENDED = "ended"


#: What may follow what.
_NEXT: Final = {
    Phase.RECEIVING: {Phase.COMPLETE, Phase.ENDED},
    Phase.COMPLETE: {Phase.WAITING, Phase.DECODING, Phase.ENDED},
    Phase.WAITING: {Phase.DECODING, Phase.ENDED},
    Phase.DECODING: {Phase.ENDED},
    Phase.ENDED: set(),
}


@dataclass(slots=True)
class Timeline:
    """A session's times in nanoseconds of the receiver's monotonic clock; 0 where not reached."""

    opened_ns: int = 0
    allocated_ns: int = 0
    complete_ns: int = 0
    started_ns: int = 0
    first_decoded_ns: int = 0
    ended_ns: int = 0
    outcome: str = ""
    blocks: list[BlockTimes] = field(default_factory=list)
    blocks_received: int = 0
    duplicate_blocks: int = 0


@dataclass(frozen=True, slots=True)
class Ended:
    """What is remembered of a session that has ended."""

    request_id: str
    phase: Phase
    tokens: int
    kv_bytes: int
    decoded: int
    timeline: Timeline


class Session:
    """Coverage and memory of one request's cache.

    Thread-safe: data threads call ``landing`` and its ``commit`` concurrently.
    """

    def __init__(
        self,
        opened: Open,
        client: Owner,
        layout: CacheLayout,
        reservation: Reservation,
    ) -> None:
        """``reservation`` covers the cache in the client's ``layout`` and its marks
        (``Coverage``); the session lets go of it when it ends."""
        self.id = opened.session
        self.request_id = opened.request_id
        self.prompt_token_ids = opened.prompt_token_ids
        self.sampling = opened.sampling
        self.client = client
        #: Whose blocks arrive; an unclaimed session that is claimed gets another ``client``.
        self.opener = client
        self.unclaimed = opened.unclaimed
        self.proof = opened.proof
        self.layout = layout
        self.reservation = reservation
        self.phase = Phase.RECEIVING
        self.first_token: int | None = None
        self.job: Job | None = None
        self.kv_bytes = 0
        self.decoded = 0
        self.timeline = Timeline(opened_ns=time.monotonic_ns())
        self.last_progress = time.monotonic()
        self._tokens = len(opened.prompt_token_ids)
        self._buffers: CacheBuffers | None = None
        self._changed = threading.Condition()
        self._coverage = Coverage(layout, self._tokens)

    @property
    def tokens(self) -> int:
        """Tokens of the prompt."""
        return self._tokens

    @property
    def complete(self) -> bool:
        """Whether every row of the cache is resident."""
        return self._coverage.absent == 0

    @property
    def allocated_layers(self) -> int:
        """Layers that there is memory for."""
        with self._changed:
            return self._buffers.layers if self._buffers is not None else 0

    def give_memory(self, buffers: CacheBuffers) -> bool:
        """Take the session's memory, which may still grow. False when the session ended
        meanwhile."""
        with self._changed:
            if self.phase is Phase.ENDED:
                return False
            self._buffers = buffers
            self.timeline.allocated_ns = time.monotonic_ns()
            return True

    def memory_grew(self) -> bool:
        """Another layer is allocated. False when the session ended meanwhile."""
        with self._changed:
            self._changed.notify_all()
            return self.phase is not Phase.ENDED

    def take_memory(self) -> CacheBuffers:
        """Hand the complete memory to the decoder. Raises WireError when the session has ended."""
        with self._changed:
            if self._buffers is None:
                raise WireError(E_SESSION, f"session {self.id} has ended")
            buffers, self._buffers = self._buffers, None
            return buffers

    def completed(self) -> bool:
        """Whether everything is there and nobody was told yet: True for one caller, who tells, and
        then calls ``announced``."""
        with self._changed:
            if self._coverage.absent or self.phase is not Phase.RECEIVING:
                return False
            self._enter(Phase.COMPLETE)
            return True

    def announced(self) -> bool:
        """Note that whoever opened the session knows that it is complete; whether it is to be
        decoded now."""
        with self._changed:
            if self.phase is not Phase.COMPLETE:
                return False
            ready = self.first_token is not None
            self._enter(Phase.DECODING if ready else Phase.WAITING)
            return ready

    def started(self, first_token: int) -> bool:
        """Note the first token; whether the session is to be decoded now."""
        with self._changed:
            if self.first_token is None:
                self.first_token = first_token
                self.timeline.started_ns = time.monotonic_ns()
                self.last_progress = time.monotonic()
            if self.phase is not Phase.WAITING:
                return False
            self._enter(Phase.DECODING)
            return True

    def _enter(self, phase: Phase) -> None:
        """With the lock. Every change of the phase passes here."""
        assert phase in _NEXT[self.phase], f"from {self.phase} to {phase}"
        self.phase = phase

    def end(self, outcome: str) -> bool:
        """Release the memory. False when the session had ended before."""
        with self._changed:
            if self.phase is Phase.ENDED:
                return False
            self._enter(Phase.ENDED)
            self.timeline.outcome = outcome
            self.timeline.ended_ns = time.monotonic_ns()
            self._buffers = None
            self._coverage.forget()
            self._changed.notify_all()
        self.reservation.release()
        return True

    def summary(self) -> Ended:
        """What is worth remembering."""
        return Ended(
            self.request_id, self.phase, self._tokens, self.kv_bytes, self.decoded, self.timeline
        )

    def missing(self) -> str:
        """The first hole in words; "" when the cache is complete."""
        return self._coverage.missing()

    def landing(self, header: Header) -> Landing:
        """Memory for a block: the cache itself, or scratch for what is there already.

        Raises WireError (``block``) naming what is wrong with the block.
        """
        wrong = self._coverage.wrong(header)
        if wrong:
            raise self._refusal(header, wrong)
        arrived = time.monotonic_ns()
        with self._changed:
            buffers = self._allocated(header)
            marks = self._coverage.at(header)
            if marks.any():
                place = self._place(header)
                if not self.reservation.take(place.nbytes, beside=True):
                    raise self._refusal(
                        header, "no memory to compare it with the first", E_CAPACITY
                    )
                scratch = np.empty_like(place)
                return Landing(
                    [scratch.data.cast("B")],
                    lambda: self._commit_duplicate(header, marks, scratch, arrived),
                    lambda: self.reservation.give_back(scratch.nbytes),
                )
            rows = buffers.rows(header.layer, header.part, *self._coverage.extent(header))
            marks[...] = ARRIVING
        return Landing(
            rows.buffers,
            lambda: self._commit(header, marks, rows, arrived),
            lambda: self._abort(marks, rows),
        )

    def _allocated(self, header: Header) -> CacheBuffers:
        """The memory, once the block's layer is there. Raises WireError."""
        # Layers come in order on both sides, and memory is much faster than a network.
        if not self._changed.wait_for(
            lambda: self._buffers is None or self._buffers.layers > header.layer, _ALLOCATE_WAIT
        ):
            raise WireError(E_CAPACITY, f"no memory for {header.describe()} yet")
        return self._live()

    def _place(self, header: Header) -> NDArray[Any]:
        """The block's piece of the cache."""
        return self._live().part(header.layer, header.part)[self._coverage.extent(header)]

    def _live(self) -> CacheBuffers:
        if self._buffers is None:
            raise WireError(E_SESSION, f"session {self.id} does not receive blocks any more")
        return self._buffers

    def _commit(self, header: Header, marks: NDArray[np.uint8], rows: Rows, arrived: int) -> None:
        rows.buffers.clear()
        rows.written()
        with self._changed:
            self._note(header, marks, arrived)

    def _abort(self, marks: NDArray[np.uint8], rows: Rows) -> None:
        """The connection broke inside the block: its place is free for another attempt."""
        rows.dropped()
        with self._changed:
            marks[...] = ABSENT
            self._changed.notify_all()

    def _commit_duplicate(
        self,
        header: Header,
        marks: NDArray[np.uint8],
        scratch: NDArray[Any],
        arrived: int,
    ) -> None:
        try:
            self._compare(header, marks, scratch, arrived)
        finally:
            self.reservation.give_back(scratch.nbytes)

    def _compare(
        self,
        header: Header,
        marks: NDArray[np.uint8],
        scratch: NDArray[Any],
        arrived: int,
    ) -> None:
        with self._changed:
            if not self._changed.wait_for(
                lambda: self._buffers is None or not (marks == ARRIVING).any(), _DUPLICATE_WAIT
            ):
                raise self._refusal(header, "another connection still sends part of it")
            place = self._place(header)
            resident = marks == RESIDENT
            conflict = resident & (place != scratch).any(axis=-1)
            if conflict.any():
                head, token = (int(index) for index in np.argwhere(conflict)[0])
                raise self._refusal(
                    header,
                    "arrived twice with different bytes, first at head "
                    f"{header.head_start + head}, token {header.token_start + token}",
                )
            place[~resident] = scratch[~resident]
            self.timeline.duplicate_blocks += 1
            self._note(header, marks, arrived)

    def _note(self, header: Header, marks: NDArray[np.uint8], arrived: int) -> None:
        new = self._coverage.arrived(marks)
        self._changed.notify_all()
        self.kv_bytes += new * header.width * ITEMSIZE[header.dtype]
        self.last_progress = time.monotonic()
        timeline = self.timeline
        timeline.blocks_received += 1
        now = time.monotonic_ns()
        if len(timeline.blocks) < MAX_TIMED_BLOCKS:
            timeline.blocks.append(
                BlockTimes(
                    layer=header.layer,
                    part=self._name(header),
                    head_start=header.head_start,
                    heads=header.heads,
                    token_start=header.token_start,
                    tokens=header.tokens,
                    computed_ns=header.computed_ns,
                    gathered_ns=header.gathered_ns,
                    sent_ns=header.sent_ns,
                    arrived_ns=arrived,
                    committed_ns=now,
                )
            )
        if self._coverage.absent == 0 and not timeline.complete_ns:
            timeline.complete_ns = now
            self._coverage.forget()
            self.reservation.give_back(self._coverage.nbytes)

    def _name(self, header: Header) -> str:
        part = self._coverage.part(header)
        return part.name if part is not None else ""

    def _refusal(self, header: Header, why: str, code: Code = E_BLOCK) -> WireError:
        return WireError(code, f"{header.describe(self._name(header))}: {why}")
