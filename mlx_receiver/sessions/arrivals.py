"""The memory of one session's cache, and what of it has arrived."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mlx_receiver.caches.adapter import Rows
from mlx_receiver.caches.memory import Reservation
from mlx_receiver.caches.model import CacheBuffers
from mlx_receiver.sessions.coverage import ABSENT, ARRIVING, RESIDENT, Coverage
from mlx_receiver.sessions.quantised import quantised
from mlx_receiver.transports.transport import Landing
from mlx_receiver.wire.frames import Header
from mlx_receiver.wire.handoffs import BlockTimes
from mlx_receiver.wire.layout import ITEMSIZE, CacheLayout, Held
from mlx_receiver.wire.messages import E_BLOCK, E_CAPACITY, E_SESSION, Code, WireError
from mlx_receiver.wire.quantised import RAW, codec_of

#: Blocks whose times are kept per session; further ones are only counted.
MAX_TIMED_BLOCKS: Final = 4096

#: How long a duplicate waits, in seconds, for the block it duplicates to finish arriving.
_DUPLICATE_WAIT: Final = 10.0

#: How long a block waits, in seconds, for its layer to be allocated.
_ALLOCATE_WAIT: Final = 10.0


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


class Arrivals:
    """What a session's blocks land in. ``Session`` adds what happens to it otherwise.

    Data threads call ``landing`` and its ``commit`` concurrently.
    """

    def __init__(
        self,
        session: int,
        tokens: int,
        layout: CacheLayout,
        codec: str,
        reservation: Reservation,
        held: Held,
    ) -> None:
        """Of a prompt of so many ``tokens``; ``held`` is there before anything arrives."""
        self.id = session
        self.tokens = tokens
        self.layout = layout
        self.codec = codec
        self.reservation = reservation
        self.held = held
        self.kv_bytes = 0
        self.timeline = Timeline(opened_ns=time.monotonic_ns())
        self.last_progress = time.monotonic()
        #: None before it is given, and once nothing is received any more.
        self._buffers: CacheBuffers | None = None
        self._changed = threading.Condition()
        self._coverage = Coverage(layout, tokens, held)

    @property
    def held_tokens(self) -> int:
        """Tokens of the prompt that an earlier text left."""
        return self.held.tokens

    @property
    def complete(self) -> bool:
        """Whether every row of the cache is resident."""
        return self._coverage.absent == 0

    @property
    def computed_bytes(self) -> int:
        """Bytes of the cache that the receiver computed."""
        return self._coverage.computed_bytes

    @property
    def missing_bytes(self) -> int:
        """Bytes of the cache that neither came nor were computed, nor held."""
        need = self.layout.nbytes(self.tokens, held=self.held)
        return need - self.kv_bytes - self.computed_bytes

    @property
    def allocated_layers(self) -> int:
        """Layers that there is memory for."""
        with self._changed:
            return self._buffers.layers if self._buffers is not None else 0

    @property
    def allocated(self) -> bool:
        """Whether there is memory for all of them."""
        return self.allocated_layers == len(self.layout.layers)

    def begin_with(self, held: Held) -> None:
        """What is there of the cache before anything arrives; before the memory is given."""
        with self._changed:
            self.held = held
            self._coverage = Coverage(self.layout, self.tokens, held)

    def missing(self) -> str:
        """The first hole in words; "" when the cache is complete."""
        return self._coverage.missing()

    def landing(self, header: Header) -> Landing:
        """Memory for a block: the cache itself, or scratch for what is there already, or quantised.

        Raises WireError (``block``) naming what is wrong with the block.
        """
        wrong = self._coverage.wrong(header)
        part = self._coverage.part(header)
        if not wrong and part is not None and header.codec != (codec := codec_of(part, self.codec)):
            wrong = f"it is {header.codec}, agreed was {codec}"
        if wrong:
            raise self._refusal(header, wrong)
        if header.codec == RAW:
            return self._plain(header)
        landing = quantised(header, self.reservation, self._plain)
        if landing is None:
            raise self._refusal(header, "no memory to decode it in", E_CAPACITY)
        return landing

    def _plain(self, header: Header) -> Landing:
        """Memory for a block's numbers."""
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

    # --- what the receiver computes of it, see ``sessions.front`` -------------------------------

    def gap(self, start: int, most: int) -> tuple[int, int] | None:
        """See ``Coverage.gap``; None when the session wants nothing any more."""
        with self._changed:
            if self._buffers is None:
                return None
            first, end = self._coverage.gap(start, most)
            return (first, end) if first < end else None

    def read(self, tokens: int, layer: int, into: CacheBuffers) -> bool:
        """Copy a layer's rows of the first tokens, which must be there. False when it has ended."""
        with self._changed:
            buffers = self._buffers
        if buffers is None:
            return False
        for part in range(len(self.layout.layers[layer].parts)):
            into.part(layer, part)[:, :tokens] = buffers.part(layer, part)[:, :tokens]
        return True

    def put(self, start: int, end: int, rows: Sequence[Sequence[NDArray[Any]]]) -> None:
        """Have these tokens' ``rows`` where none are: for each part of each layer ``[heads,
        tokens, width]``."""
        with self._changed:
            buffers = self._buffers
            if buffers is None:
                return
            if self._coverage.absent == 0:
                return  # the last of it has come, and its marks are gone
            claims = self._coverage.claim(start, end)
        try:
            for layer, found in enumerate(claims):
                for part, (_, absent) in enumerate(found):
                    # No alias may be left when they are known to be there.
                    where = True if absent.all() else absent[..., None]
                    place = buffers.part(layer, part)[:, start:end]
                    np.copyto(place, rows[layer][part], where=where)
                    del place
        except BaseException:
            with self._changed:
                self._coverage.absent_again(claims)
                self._changed.notify_all()
            raise
        with self._changed:
            if self._buffers is None:
                return  # it has ended
            self._coverage.computed(claims)
            self._changed.notify_all()
            self.last_progress = time.monotonic()
            if self._coverage.absent == 0:
                self._fill()

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
            # What was computed here stays as it is, although it differs.
            new = marks == ABSENT
            place[new] = scratch[new]
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
        if self._coverage.absent == 0:
            self._fill()

    def _fill(self) -> None:
        """Everything is there: marks are not needed any more."""
        if not self.timeline.complete_ns:
            self.timeline.complete_ns = time.monotonic_ns()
            self._coverage.forget()
            self.reservation.give_back(self._coverage.nbytes)

    def _name(self, header: Header) -> str:
        part = self._coverage.part(header)
        return part.name if part is not None else ""

    def _refusal(self, header: Header, why: str, code: Code = E_BLOCK) -> WireError:
        return WireError(code, f"{header.describe(self._name(header))}: {why}")
