"""One request on the receiver: its memory, what of its cache has arrived, and when."""

from __future__ import annotations

import enum
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from mlx_receiver.caches.memory import Reservation
from mlx_receiver.caches.plain import CacheBuffers, Rows
from mlx_receiver.transports.transport import Landing
from mlx_receiver.wire.frames import ITEMSIZE, Header, Plane
from mlx_receiver.wire.messages import E_BLOCK, E_CAPACITY, E_SESSION, Open, WireError
from mlx_receiver.wire.signature import ModelSignature

if TYPE_CHECKING:
    from mlx_receiver.decode.jobs import Job

#: Blocks whose times are kept per session; further ones are only counted.
MAX_TIMED_BLOCKS: Final = 4096

#: How long a duplicate waits, in seconds, for the block it duplicates to finish arriving.
_DUPLICATE_WAIT: Final = 10.0

#: How long a block waits, in seconds, for its layer to be allocated.
_ALLOCATE_WAIT: Final = 10.0

_ABSENT, _ARRIVING, _RESIDENT = 0, 1, 2


class Owner(Protocol):
    """Whose session it is: who opened it, or has claimed it since."""

    id: str  # DataTicket.client of whoever opened it


class State(enum.StrEnum):
    """Where a session is in its life; the first three are the wire's ``Progress.state``."""

    RECEIVING = "receiving"
    WAITING = "waiting"
    DECODING = "decoding"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class BlockTimes:
    """When one block was where. The first three are the sender's clock, the last two ours (ns)."""

    layer: int
    plane: str
    head_start: int
    heads: int
    token_start: int
    tokens: int
    computed_ns: int
    gathered_ns: int
    sent_ns: int
    arrived_ns: int
    committed_ns: int


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
    state: State
    tokens: int
    kv_bytes: int
    decoded: int
    timeline: Timeline


def coverage_bytes(signature: ModelSignature, tokens: int) -> int:
    """Bytes of the map of what has arrived: 1 / (2 head_dim) of a cache in 16 bits."""
    return signature.layers * 2 * signature.kv_heads * tokens


class Session:
    """Coverage and memory of one request's cache.

    Thread-safe: bulk threads call ``landing`` and its ``commit`` concurrently.
    """

    def __init__(
        self,
        opened: Open,
        client: Owner,
        signature: ModelSignature,
        kv_dtype: str,
        reservation: Reservation,
    ) -> None:
        """``reservation`` covers the cache and ``coverage_bytes``; the session lets go of it when
        it ends."""
        self.id = opened.session
        self.request_id = opened.request_id
        self.prompt_token_ids = opened.prompt_token_ids
        self.sampling = opened.sampling
        self.client = client
        #: Whose blocks arrive; a parked session that is claimed gets another ``client``.
        self.opener = client
        self.parked = opened.parked
        self.kv_dtype = kv_dtype
        self.reservation = reservation
        self.state = State.RECEIVING
        self.first_token: int | None = None
        self.job: Job | None = None
        self.kv_bytes = 0
        self.decoded = 0
        self.timeline = Timeline(opened_ns=time.monotonic_ns())
        self.last_progress = time.monotonic()
        self._signature = signature
        self._tokens = len(opened.prompt_token_ids)
        self._buffers: CacheBuffers | None = None
        self._changed = threading.Condition()
        self._shape = (signature.layers, 2, signature.kv_heads, self._tokens)
        self._cells: NDArray[np.uint8] = np.zeros(self._shape, np.uint8)
        self._absent = self._cells.size
        self._claimed = False
        self._announced = False

    @property
    def tokens(self) -> int:
        """Tokens of the prompt, each of which has K and V to receive."""
        return self._tokens

    @property
    def complete(self) -> bool:
        """Whether every (layer, plane, head, token) is resident."""
        return self._absent == 0

    @property
    def allocated_layers(self) -> int:
        """Layers that there is memory for."""
        with self._changed:
            return self._buffers.layers if self._buffers is not None else 0

    def give_memory(self, buffers: CacheBuffers) -> bool:
        """Take the session's memory, which may still grow. False when the session ended
        meanwhile."""
        with self._changed:
            if self.state is State.ENDED:
                return False
            self._buffers = buffers
            self.timeline.allocated_ns = time.monotonic_ns()
            return True

    def memory_grew(self) -> bool:
        """Another layer is allocated. False when the session ended meanwhile."""
        with self._changed:
            self._changed.notify_all()
            return self.state is not State.ENDED

    def take_memory(self) -> CacheBuffers:
        """Hand the complete memory to the decoder. Raises WireError when the session has ended."""
        with self._changed:
            if self._buffers is None:
                raise WireError(E_SESSION, f"session {self.id} has ended")
            buffers, self._buffers = self._buffers, None
            return buffers

    def begin(self, first_token: int | None = None, announced: bool = False) -> bool:
        """Note the first token, or that completeness was announced; True once, with both."""
        with self._changed:
            self._announced = self._announced or announced
            if first_token is not None and self.first_token is None:
                self.first_token = first_token
                self.timeline.started_ns = time.monotonic_ns()
                self.last_progress = time.monotonic()
            ready = self._announced and self.first_token is not None
            if self.state not in (State.RECEIVING, State.WAITING):
                return False
            if ready:
                self.state = State.DECODING
            elif self._announced:
                self.state = State.WAITING
            return ready

    def claim_completion(self) -> bool:
        """True for the one caller that may announce the complete cache."""
        with self._changed:
            claimed, self._claimed = not self._claimed, True
            return claimed

    def end(self, outcome: str) -> bool:
        """Release the memory. False when the session had ended before."""
        with self._changed:
            if self.state is State.ENDED:
                return False
            self.state = State.ENDED
            self.timeline.outcome = outcome
            self.timeline.ended_ns = time.monotonic_ns()
            self._buffers = None
            self._cells = _all_resident(self._shape)
            self._changed.notify_all()
        self.reservation.release()
        return True

    def summary(self) -> Ended:
        """What is worth remembering."""
        return Ended(
            self.request_id, self.state, self._tokens, self.kv_bytes, self.decoded, self.timeline
        )

    def missing(self) -> str:
        """The first hole in words; "" when the cache is complete."""
        cells, absent = self._cells, self._absent
        # Layer by layer: a list of all holes would be larger than the cache.
        for layer, holes in enumerate(planes != _RESIDENT for planes in cells):
            if not holes.any():
                continue
            plane, head, token = map(int, np.unravel_index(holes.argmax(), holes.shape))
            row = holes[plane, head, token:]
            last = token + (len(row) if row.all() else int(row.argmin())) - 1
            return (
                f"layer {layer}, {Plane(plane).name.lower()}, head {head}, tokens {token}..{last} "
                f"({absent} of {cells.size} cells are missing)"
            )
        return ""

    def landing(self, header: Header) -> Landing:
        """Memory for a block: the cache itself, or scratch for what is there already.

        Raises WireError (``block``) naming what is wrong with the block.
        """
        self._check(header)
        arrived = time.monotonic_ns()
        with self._changed:
            buffers = self._allocated(header)
            cells = self._cells[header.layer, header.plane][_extent(header)]
            if cells.any():
                place = self._place(header)
                if not self.reservation.take(place.nbytes, beside=True):
                    raise WireError(
                        E_CAPACITY, f"{header.describe()}: no memory to compare it with the first"
                    )
                scratch = np.empty_like(place)
                return Landing(
                    [scratch.data.cast("B")],
                    lambda: self._commit_duplicate(header, cells, scratch, arrived),
                    lambda: self.reservation.give_back(scratch.nbytes),
                )
            rows = buffers.rows(header.layer, header.plane, *_extent(header))
            cells[...] = _ARRIVING
        return Landing(
            rows.buffers,
            lambda: self._commit(header, cells, rows, arrived),
            lambda: self._abort(cells, rows),
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
        """The block's part of its plane."""
        return self._live().plane(header.layer, header.plane)[_extent(header)]

    def _live(self) -> CacheBuffers:
        if self._buffers is None:
            raise WireError(E_SESSION, f"session {self.id} does not receive blocks any more")
        return self._buffers

    def _commit(self, header: Header, cells: NDArray[np.uint8], rows: Rows, arrived: int) -> None:
        rows.buffers.clear()
        rows.written()
        with self._changed:
            self._note(header, cells, arrived)

    def _abort(self, cells: NDArray[np.uint8], rows: Rows) -> None:
        """The connection broke inside the block: its place is free for another attempt."""
        rows.dropped()
        with self._changed:
            cells[...] = _ABSENT
            self._changed.notify_all()

    def _commit_duplicate(
        self,
        header: Header,
        cells: NDArray[np.uint8],
        scratch: NDArray[Any],
        arrived: int,
    ) -> None:
        try:
            self._compare(header, cells, scratch, arrived)
        finally:
            self.reservation.give_back(scratch.nbytes)

    def _compare(
        self,
        header: Header,
        cells: NDArray[np.uint8],
        scratch: NDArray[Any],
        arrived: int,
    ) -> None:
        with self._changed:
            if not self._changed.wait_for(
                lambda: self._buffers is None or not (cells == _ARRIVING).any(), _DUPLICATE_WAIT
            ):
                raise WireError(
                    E_BLOCK,
                    f"{header.describe()}: another connection still sends part of it",
                )
            place = self._place(header)
            resident = cells == _RESIDENT
            conflict = resident & (place != scratch).any(axis=-1)
            if conflict.any():
                head, token = (int(index) for index in np.argwhere(conflict)[0])
                raise WireError(
                    E_BLOCK,
                    f"{header.describe()}: arrived twice with different bytes, first at head "
                    f"{header.head_start + head}, token {header.token_start + token}",
                )
            place[~resident] = scratch[~resident]
            self.timeline.duplicate_blocks += 1
            self._note(header, cells, arrived)

    def _note(self, header: Header, cells: NDArray[np.uint8], arrived: int) -> None:
        new = int(np.count_nonzero(cells != _RESIDENT))
        if new:
            cells[...] = _RESIDENT
        self._changed.notify_all()
        self._absent -= new
        self.kv_bytes += new * header.head_dim * ITEMSIZE[header.dtype]
        self.last_progress = time.monotonic()
        timeline = self.timeline
        timeline.blocks_received += 1
        now = time.monotonic_ns()
        if len(timeline.blocks) < MAX_TIMED_BLOCKS:
            timeline.blocks.append(
                BlockTimes(
                    header.layer,
                    header.plane.name.lower(),
                    header.head_start,
                    header.heads,
                    header.token_start,
                    header.tokens,
                    header.computed_ns,
                    header.gathered_ns,
                    header.sent_ns,
                    arrived,
                    now,
                )
            )
        if self._absent == 0 and not timeline.complete_ns:
            timeline.complete_ns = now
            self._cells = _all_resident(self._shape)
            self.reservation.give_back(self._cells.size)

    def _check(self, header: Header) -> None:
        signature = self._signature
        wrong = ""
        if header.layer >= signature.layers:
            wrong = f"the model has {signature.layers} layers"
        elif header.head_dim != signature.head_dim:
            wrong = f"head_dim is {header.head_dim}, the model's {signature.head_dim}"
        elif header.dtype != self.kv_dtype:
            wrong = f"dtype is {header.dtype}, agreed was {self.kv_dtype}"
        elif header.head_start + header.heads > signature.kv_heads:
            wrong = f"the model has {signature.kv_heads} KV heads"
        elif header.token_start + header.tokens > self._tokens:
            wrong = f"the prompt has {self._tokens} tokens"
        if wrong:
            raise WireError(E_BLOCK, f"{header.describe()}: {wrong}")


def _all_resident(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """A map of one byte, whatever its shape, that nobody writes."""
    return np.broadcast_to(np.uint8(_RESIDENT), shape)


def _extent(header: Header) -> tuple[slice, slice]:
    """A block's heads and tokens in its plane."""
    return (
        slice(header.head_start, header.head_start + header.heads),
        slice(header.token_start, header.token_start + header.tokens),
    )
