"""What one receiver gets: a thread that gathers blocks into staging buffers, others that send them.

Each receiver has threads, connections and staging of its own, so that one that is slow or stuck
holds up nothing of another's.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import msgspec
import torch
from vllm.logger import init_logger

from mlx_receiver.transports.transport import TransportError
from mlx_receiver.wire.frames import DataReply, Header, Kind
from mlx_receiver.wire.layout import NOTHING, Held
from mlx_receiver.wire.messages import WireError
from mlx_receiver.wire.quantised import RAW
from vllm_mac_decode.export import DataTarget, ExportSpan
from vllm_mac_decode.settings import Settings
from vllm_mac_decode.worker.from_end import FromEnd
from vllm_mac_decode.worker.ledger import BlockLedger
from vllm_mac_decode.worker.paged_cache import ExportedLayer, PagedPart
from vllm_mac_decode.worker.quantise import Quantised, Scratch
from vllm_mac_decode.worker.sender import DataChannel, Frame, Staged
from vllm_mac_decode.worker.staging import SLOT_BYTES, DeviceClock, NoStaging, Slot, StagingRing

logger = init_logger("vllm.mac_decode.exporter")

_POLL_SECONDS = 0.0005
_IDLE_SECONDS = 0.2

#: Dead sessions whose numbers are kept: far more than there can be jobs of under way.
_REMEMBERED = 16384


@dataclass(frozen=True)
class Job:
    """One layer of one span. ``written`` is a torch.cuda.Event, or None on the CPU."""

    layer: ExportedLayer
    span: ExportSpan
    written: Any
    computed_ns: int


@dataclass
class _Session:
    generation: int = 0  # of the connections on which the receiver was asked; 0: not yet
    accepted: bool = False
    held: Held = NOTHING  # what the receiver has of it, once it has accepted
    backlog: deque[Job] = field(default_factory=deque)


class Destination:
    """Streams spans of the paged cache to one receiver, in the background."""

    def __init__(
        self,
        ring: StagingRing,
        settings: Settings,
        ledger: BlockLedger,
        clock: DeviceClock | None,
        fault: Callable[[], None],
    ) -> None:
        """``fault`` is called when a thread ends by one."""
        self._ring = ring
        self._ledger = ledger
        self._channel = DataChannel(settings, ring, clock, self._is_dead, self._fail)

        self._lock = threading.Lock()
        #: Sessions that no longer matter, in the order in which they died. An old one may be
        #: forgotten, a young one must not be taken for new.
        self._dead: dict[int, None] = {}
        self._unreachable: list[int] = []  # those of them that the scheduler half should hear of
        self._target: DataTarget | None = None

        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._sessions: dict[int, _Session] = {}  # gather thread only, like the next three
        self._from_end = FromEnd[Job]()
        #: The tensors' block ids of the latest span, by group and split.
        self._ids_of: ExportSpan | None = None
        self._ids: dict[tuple[int, int], torch.Tensor] = {}
        self._scratch = Scratch()
        self._closing = False
        self._fault = fault
        loops = {"gather": self._gather_loop} | {
            f"send-{i}": partial(self._channel.run, i) for i in range(settings.most_streams)
        }
        self.threads = [
            threading.Thread(target=self._run, args=(loop,), name=f"mac-decode-{name}", daemon=True)
            for name, loop in loops.items()
        ]
        for thread in self.threads:
            thread.start()

    # --- the engine's thread ----------------------------------------------------------------

    def aim(self, target: DataTarget) -> None:
        """Where the next jobs' blocks go."""
        with self._lock:
            self._target = target

    def bury(self, sessions: list[int]) -> None:
        """These sessions have ended."""
        with self._lock:
            self._bury(sessions)

    def put(self, job: Job) -> None:
        """Read and send it, after what was put before."""
        self._jobs.put(job)

    def take_unreachable(self) -> list[int]:
        """Sessions given up since the last call because no connection could be made."""
        with self._lock:
            found, self._unreachable = self._unreachable, []
        return found

    def stop(self) -> None:
        """From now on nothing is read or sent."""
        self._closing = True

    def end(self) -> None:
        """End the threads, and wait for that a while; what has not been sent is lost."""
        self._closing = True
        self._jobs.put(None)
        self._channel.close()
        for thread in self.threads:
            thread.join(timeout=2.0)

    # --- the threads -----------------------------------------------------------------------

    def _run(self, loop: Any) -> None:
        try:
            self._ring.enter()
            loop()
        except Exception as error:
            if not self._closing:
                logger.exception("a fault in the KV export: %s", error)
                self._fault()
            self._channel.drop()  # the receiver gives up what it waits for

    def _is_dead(self, session: int) -> bool:
        # Once this is closing, vLLM may reuse blocks that a GPU has yet to gather: nothing is sent.
        with self._lock:
            return self._closing or session in self._dead

    # --- gathering --------------------------------------------------------------------------

    def _gather_loop(self) -> None:
        while not self._closing:
            job = self._next_job()
            if self._closing:
                return
            if job is not None:
                self._dispatch(job)
            elif self._from_end:
                self._gather_newest()
            self._take_replies()
            self._sweep()

    def _next_job(self) -> Job | None:
        """The next one, if it comes soon: what leaves from its end waits for later tokens."""
        pending = any(not s.accepted for s in self._sessions.values())
        try:
            if self._from_end:
                return self._jobs.get_nowait()
            return self._jobs.get(timeout=_POLL_SECONDS if pending else _IDLE_SECONDS)
        except queue.Empty:
            return None

    def _dispatch(self, job: Job) -> None:
        span = job.span
        if self._is_dead(span.session):
            self._ledger.read(span.request_id)
            return
        session = self._sessions.get(span.session)
        if session is None:
            session = self._sessions[span.session] = _Session()
            self._attach(span.session, session)
        if session.accepted:
            self._gather(job, session.held)
        else:
            session.backlog.append(job)

    def _attach(self, session_id: int, session: _Session) -> None:
        """Ask the receiver whether the session may receive blocks, once there are connections."""
        with self._lock:
            target = self._target
        try:
            session.generation = self._channel.attach(session_id, target)
        except TransportError as error:
            self._give_up(session_id, str(error))

    def _give_up(self, session_id: int, reason: str) -> None:
        """Its blocks cannot be sent; the scheduler half should hear of it."""
        self._fail(session_id, reason)
        with self._lock:
            self._unreachable.append(session_id)

    def _take_replies(self) -> None:
        waiting = [(i, s) for i, s in self._sessions.items() if not s.accepted]
        for session_id, session in waiting:
            if not session.generation and not self._is_dead(session_id):
                self._attach(session_id, session)
        asked = {i: s.generation for i, s in self._sessions.items() if s.generation}
        if not asked:
            return
        generation, problem = self._channel.generation, "the data connection is gone"
        try:
            for reply in self._channel.replies(wait=bool(waiting)):
                self._take_reply(reply)
        except (TransportError, WireError, msgspec.MsgspecError) as error:
            self._channel.drop(generation)
            generation, problem = 0, str(error)
        # Part of a session's blocks may be lost with the connections on which it was asked.
        for session_id, asked_on in asked.items():
            if asked_on != generation:
                self._fail(session_id, problem)

    def _take_reply(self, reply: DataReply) -> None:
        session = self._sessions.get(reply.session)
        if session is None:
            return
        if not reply.accepted:
            self._fail(reply.session, reply.reason)
            return
        session.accepted, session.held = True, reply.held
        while session.backlog:
            job = session.backlog.popleft()
            if self._is_dead(reply.session):
                self._ledger.read(job.span.request_id)
            else:
                self._gather(job, session.held)

    def _fail(self, session_id: int, reason: str) -> None:
        """Give a session up. The receiver or the relay's clock tells vLLM's other half."""
        logger.debug("session %d: export given up: %s", session_id, reason)
        with self._lock:
            self._bury([session_id])

    def _bury(self, sessions: list[int]) -> None:
        """With the lock."""
        self._dead.update(dict.fromkeys(sessions))
        while len(self._dead) > _REMEMBERED:
            del self._dead[next(iter(self._dead))]

    def _sweep(self) -> None:
        """Forget dead sessions and the jobs that waited for them."""
        for session_id in [s for s in self._sessions if self._is_dead(s)]:
            unsent = self._from_end.drop(session_id)
            if unsent:
                self._ring.settle()
            for job in [*self._sessions.pop(session_id).backlog, *unsent]:
                self._ledger.read(job.span.request_id)

    def _gather(self, job: Job, held: Held) -> None:
        """Copy one layer of a span into staging and queue it for sending, now or from its end."""
        span, layer = job.span, job.layer
        if not span.from_end or not layer.by_token:
            self._read(job, list(self._pieces(span, layer, held)))
            return
        start = max(span.start, layer.start(span.prompt_tokens, held))
        if start < span.end:
            self._from_end.add(span.session, job, start, span.end)
        else:
            self._ledger.read(span.request_id)

    def _gather_newest(self) -> None:
        """One piece of what leaves from its end."""
        job, low, high, last = self._from_end.take()
        self._read(job, list(self._pieces(job.span, job.layer, NOTHING, low, high)), last)

    def _read(self, job: Job, pieces: Sequence[_Piece], last: bool = True) -> None:
        """Copy the pieces into staging, one by one, and queue them for sending; the ``last`` ones
        of the job."""
        span = job.span
        for piece in pieces:
            if self._is_dead(span.session) or self._closing:
                self._ring.settle()
                break
            try:
                slot, frames = self._stage(job, piece)
            except NoStaging as error:
                self._give_up(span.session, str(error))
                self._ring.settle()
                break
            # On a GPU the pieces are only queued so far, in order: the last one's bytes tell.
            queued = self._ring.stream is not None and piece is pieces[-1] and last
            read = partial(self._ledger.read, span.request_id)
            self._channel.put(Staged(slot, frames, read if queued else None))
            if queued:
                return
        if last:
            self._ledger.read(span.request_id)

    def _stage(self, job: Job, piece: _Piece) -> tuple[Slot, list[Frame]]:
        """Have a piece read into a slot; its frames. Raises NoStaging."""
        layer, read = job.layer, partial(job.layer.read, piece.blocks)
        if job.span.codec != RAW and layer.by_token:
            return self._stage_quantised(job, piece, read)
        sizes = [part.nbytes(piece.rows) for part in layer.layout.parts]
        slot = self._ring.acquire(sum(sizes))
        slot.fill(sum(sizes), read, job.written)
        frames: list[Frame] = []
        begin = 0
        for index, (part, size) in enumerate(zip(layer.layout.parts, sizes, strict=True)):
            rows = slot.memory[begin : begin + size]
            for low, place, count in piece.runs(part):
                payload = _tokens(
                    rows, part.heads, low * part.row_bytes, (low + count) * part.row_bytes
                )
                header = _header(job, layer.first_part + index, part, place, place + count)
                frames.append((header, payload))
            begin += size
        return slot, frames

    def _stage_quantised(
        self, job: Job, piece: _Piece, read: Callable[[torch.Tensor], None]
    ) -> tuple[Slot, list[Frame]]:
        """The same, of a session whose K and V travel quantised."""
        layer, low, high = job.layer, piece.low - piece.first, piece.high - piece.first
        content = Quantised(layer.layout.parts, job.span.codec, piece.rows, low, high)
        slot = self._ring.acquire(content.nbytes)
        fill = partial(content.fill, read, self._scratch)
        try:
            slot.fill(content.nbytes, fill, job.written)
        except torch.OutOfMemoryError as error:
            self._ring.release(slot)
            raise NoStaging(f"no memory to quantise blocks in: {error}") from None
        frames: list[Frame] = []
        for index, (part, codec, begin, end) in enumerate(content.places):
            header = _header(job, layer.first_part + index, part, piece.low, piece.high)
            header = replace(header, codec=codec, payload_bytes=end - begin)
            frames.append((header, [slot.memory[begin:end]]))
        return slot, frames

    def _pieces(
        self,
        span: ExportSpan,
        layer: ExportedLayer,
        held: Held,
        low: int = 0,
        high: int | None = None,
    ) -> Iterator[_Piece]:
        """What of a layer a span brings beside what is held, in pieces that fit into a slot: of its
        tokens ``low`` to ``high`` where it has a row of each."""
        layout, size = layer.layout, layer.layout.block_size
        if not layer.by_token:
            # States are those of all tokens so far, in the last one's block.
            if span.end == span.prompt_tokens:
                yield _Piece(self._tensor_blocks(span, layer)[-1:], 1, 0, 0, 1)
            return
        start = max(low, span.start, layer.start(span.prompt_tokens, held))
        end = span.end if high is None else high
        if start >= end:
            return
        ids = self._tensor_blocks(span, layer)
        base = span.start - span.start % layer.block_size  # first token of ids[0]
        block = size * sum(part.heads * part.row_bytes for part in layout.parts)
        per_piece = max(1, SLOT_BYTES // block)
        last = -(-(end - base) // size)
        for at in range((start - base) // size, last, per_piece):
            blocks = ids[at : min(at + per_piece, last)]
            first, rows = base + at * size, len(blocks) * size
            yield _Piece(blocks, rows, first, max(start, first), min(end, first + rows))

    def _tensor_blocks(self, span: ExportSpan, layer: ExportedLayer) -> torch.Tensor:
        """The tensor's block ids of a span, on its device; the same for every layer of a group."""
        if self._ids_of is not span:
            self._ids_of, self._ids = span, {}
        key = (layer.group, layer.split)
        if key not in self._ids:
            ids = torch.tensor(span.block_ids[layer.group], dtype=torch.int64)
            if layer.split > 1:
                ids = (ids[:, None] * layer.split + torch.arange(layer.split)).flatten()
            if self._ring.stream is not None:
                # On the stream that will read them: the default one has compute queued on it.
                with torch.cuda.stream(self._ring.stream):
                    ids = ids.to(self._ring.device)
            self._ids[key] = ids
        return self._ids[key]


@dataclass(frozen=True, eq=False)
class _Piece:
    """Blocks that are read at once: ``rows`` of each head, the first one being that of token
    ``first``, of which ``low`` to ``high`` are wanted."""

    blocks: torch.Tensor
    rows: int
    first: int
    low: int
    high: int

    def runs(self, part: PagedPart) -> list[tuple[int, int, int]]:
        """What of a part leaves: the row here, the token or row of the model's part, how many."""
        if part.by_token:
            return [(self.low - self.first, self.low, self.high - self.low)]
        if part.runs is None:
            return [(0, 0, part.rows)]
        return [(run.first, run.place, run.count) for run in part.runs]


def _header(job: Job, index: int, part: PagedPart, low: int, high: int) -> Header:
    return Header(
        kind=Kind.BLOCK,
        session=job.span.session,
        payload_bytes=part.heads * (high - low) * part.row_bytes,
        layer=job.layer.index,
        part=index,
        dtype=part.dtype,
        head_start=job.layer.head(part),
        heads=part.heads,
        width=part.width,
        token_start=low,
        tokens=high - low,
        computed_ns=job.computed_ns,
    )


def _tokens(rows: memoryview, heads: int, low: int, high: int) -> list[memoryview]:
    """Bytes low .. high of every head's row, in as few parts as possible."""
    row = rows.nbytes // heads
    if (low, high) == (0, row):
        return [rows]
    return [rows[at + low : at + high] for at in range(0, rows.nbytes, row)]
