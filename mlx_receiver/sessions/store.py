"""The sessions that exist, the memory they may take, and the blocks that arrive for them."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final, Protocol

from mlx_receiver.caches import memory
from mlx_receiver.caches.memory import Budget
from mlx_receiver.caches.model import ModelCache
from mlx_receiver.decode.jobs import Job
from mlx_receiver.metrics import Metrics
from mlx_receiver.sessions.allocation import Allocation
from mlx_receiver.sessions.disk import DiskTier
from mlx_receiver.sessions.earlier import NEW, Beginning, EarlierTexts
from mlx_receiver.sessions.overdue import overdue
from mlx_receiver.sessions.session import NO_KV, Ended, Owner, Phase, Session
from mlx_receiver.transports.transport import Landing
from mlx_receiver.wire.frames import DataReply, Header
from mlx_receiver.wire.layout import CacheLayout
from mlx_receiver.wire.messages import (
    E_BLOCK,
    E_CAPACITY,
    E_CREDENTIALS,
    E_SESSION,
    Code,
    DataTicket,
    Open,
    WireError,
)
from mlx_receiver.wire.sampling import Sampling

logger = logging.getLogger(__name__)

#: Seconds that a worker's ATTACH waits for the Open of its session on the other channel.
ATTACH_SECONDS: Final = 5.0

#: A text that begins with a copy of an earlier one's cache gets room for this part of its tokens
#: more: the turns after it are written into that, and a long conversation is copied seldom.
SPARE_PART: Final = 4

#: Ended sessions whose timelines are kept.
KEPT_TIMELINES: Final = 32

#: ATTACHes of one client that may wait at once; it has one for each worker and session.
_MAX_WAITING: Final = 1024

Reply = Callable[[DataReply], None]


class SessionEvents(Protocol):
    """What the store tells its owner. Called from data and allocator threads; must not block."""

    def opened(self, session: Session) -> None:
        """The session's memory is there."""

    def complete(self, session: Session) -> None:
        """Every row of the session's cache is resident."""

    def failed(self, session: Session, code: Code, reason: str) -> None:
        """The session has been given up and freed."""


class SessionStore:
    """Admits sessions within a byte budget and lands their blocks (a ``BlockSink``)."""

    def __init__(
        self,
        *,
        max_sessions: int,
        events: SessionEvents,
        metrics: Metrics,
        keeps: bool = True,
    ) -> None:
        """``keeps``: the caches of texts that have ended, for later ones that begin like them."""
        self.budget = Budget()
        self.earlier = EarlierTexts(self.budget, metrics, keeps)
        self.residents = self.earlier.residents
        self.max_sessions = max_sessions
        self._events = events
        self._metrics = metrics
        self._lock = threading.Lock()
        self._sessions: dict[int, Session] = {}
        #: Keys of the clients that may send blocks, by ``DataTicket.client``.
        self._keys: dict[str, bytes] = {}
        #: By client and session.
        self._waiting: dict[tuple[str, int], list[tuple[float, Reply]]] = {}
        self._recent: deque[Ended] = deque(maxlen=KEPT_TIMELINES)
        self._allocation = Allocation(self.earlier, self._opened, events.complete, self.fail)
        self._accepting = True

    def configure(self, cache: ModelCache, budget_bytes: int, disk: DiskTier | None = None) -> None:
        """What is known once the model is loaded; until then nothing is admitted."""
        self._allocation.cache = cache
        self.earlier.configure(cache, disk)
        self.budget.kept = self.residents
        self.budget.configure(cache, budget_bytes)

    # --- what the control channel asks ---------------------------------------------------------

    def admit(self, ticket: DataTicket) -> None:
        """Let a client's workers connect, until it is dismissed."""
        with self._lock:
            self._keys[ticket.client] = ticket.key

    def dismiss(self, client: str) -> None:
        """The client has gone: its ticket opens no connection any more."""
        with self._lock:
            self._keys.pop(client, None)

    def open(
        self, message: Open, client: Owner, layout: CacheLayout, partition: str = ""
    ) -> Session:
        """Reserve a session's memory in the client's ``layout``; ``SessionEvents.opened`` follows
        when it is allocated. What it shares with an earlier text of the ``partition`` is there.

        Raises WireError: ``capacity`` when it does not fit, ``session`` for an id in use.
        """
        # Whoever claims an unclaimed session says only then how much text it may become.
        headroom = memory.HEADROOM
        if not message.unclaimed:
            headroom = min(message.sampling.max_tokens, headroom)
        beginning = NEW
        if not message.proof:
            beginning = self.earlier.find(partition, message.prompt_token_ids, layout, headroom)
        spare = 0
        if beginning.branch or (beginning.found is not None and not beginning.alone):
            spare = len(message.prompt_token_ids) // SPARE_PART
        while True:
            try:
                session = self._reserve(
                    message, client, layout, partition, headroom, beginning, spare
                )
                break
            except WireError:
                # Perhaps there is room with less than what would be good.
                if not spare and beginning.found is None:
                    raise
                if not spare:
                    beginning.release()
                    beginning = NEW
                spare = 0
        self._allocation.begin(session, headroom + spare)
        return session

    def _reserve(
        self,
        message: Open,
        client: Owner,
        layout: CacheLayout,
        partition: str,
        headroom: int,
        beginning: Beginning,
        spare: int,
    ) -> Session:
        """The session, once its memory is reserved. Raises WireError."""
        tokens = len(message.prompt_token_ids)
        marks = layout.cells(tokens, beginning.held)
        with self._lock:
            self._check_room(message, client)
            reservation = self.budget.reserve(
                tokens, headroom, layout.itemsize, marks, beginning.there, spare
            )
            if beginning.alone:
                # Blocks may be written into its memory as long as anyone holds the reservation.
                reservation.finally_do(beginning.release)
            session = Session(message, client, layout, reservation, beginning, partition)
            self._sessions[session.id] = session
            reservation.hold()  # for the allocating thread
        return session

    def compute(self, message: Open, client: Owner, job: Job) -> Session:
        """The session of a prompt that the receiver computes itself, with the job that does: its
        memory is reserved. Raises WireError as ``open`` does."""
        self.earlier.prepare(job)
        reservation = job.reservation
        assert reservation is not None
        try:
            with self._lock:
                self._check_room(message, client)
                reservation.hold()
                session = Session(message, client, NO_KV, reservation)
                session.job = job
                self._sessions[session.id] = session
        except WireError:
            reservation.release()
            raise
        return session

    def _check_room(self, message: Open, client: Owner) -> None:
        """Raise WireError where there is no place for the session. The lock is held."""
        if message.session in self._sessions:
            raise WireError(E_SESSION, f"session {message.session} exists already")
        if not self._accepting:
            raise WireError(E_CAPACITY, "the receiver is stopping")
        if len(self._sessions) >= self.max_sessions:
            raise WireError(E_CAPACITY, f"{len(self._sessions)} sessions are open (--max-sessions)")
        owners = {s.opener.id for s in self._sessions.values()}
        # Some of the last places are for clients that have none.
        kept = min(len(self._keys.keys() - owners), self.max_sessions // 4)
        if client.id in owners and len(self._sessions) >= self.max_sessions - kept:
            raise WireError(
                E_CAPACITY,
                f"{len(self._sessions)} sessions are open, and {kept} of {self.max_sessions} "
                "are kept for other clients (--max-sessions)",
            )

    def get(self, session_id: int) -> Session | None:
        """The session of that id, unless it has ended."""
        with self._lock:
            return self._sessions.get(session_id)

    def adopt(self, session: Session, client: Owner, sampling: Sampling) -> bool:
        """Give an unclaimed session to the client that claims it; False when it is too late."""
        with self._lock:
            if session.id not in self._sessions or not session.unclaimed:
                return False
            session.unclaimed = False
            session.client, session.sampling = client, sampling
            return True

    def of_client(self, client: object) -> list[Session]:
        """The client's sessions."""
        with self._lock:
            return [s for s in self._sessions.values() if s.client is client]

    def end(self, session: Session, outcome: str) -> bool:
        """Forget the session and free its memory. False when it had ended before."""
        if not session.end(outcome):
            return False
        with self._lock:
            self._sessions.pop(session.id, None)
            self._recent.append(session.summary())
            waiting = self._waiting.pop((session.opener.id, session.id), [])
        self._metrics.sessions.labels(outcome).inc()
        _answer(waiting, DataReply(session.id, False, E_SESSION, f"the session ended: {outcome}"))
        return True

    def fail(self, session: Session, code: Code, reason: str) -> None:
        """Give the session up and tell the owner."""
        if self.end(session, f"failed:{code}"):
            logger.warning("session %s (%s) failed: %s", session.id, session.request_id, reason)
            self._events.failed(session, code, reason)

    def sweep(self) -> None:
        """Answer attaches that waited too long; give up sessions that have come to nothing."""
        now = time.monotonic()
        with self._lock:
            late = {
                (client, session): replies
                for (client, session), replies in self._waiting.items()
                if self._of(client, session) is None and replies[0][0] < now
            }
            for key in late:
                del self._waiting[key]
            sessions = list(self._sessions.values())
        for (_, session_id), replies in late.items():
            _answer(replies, DataReply(session_id, False, E_SESSION, "no such session was opened"))
        for session, code, reason in overdue(sessions, now):
            self.fail(session, code, reason)

    def close(self) -> None:
        """Accept nothing any more and end every session."""
        with self._lock:
            self._accepting = False
            sessions = list(self._sessions.values())
        for session in sessions:
            self.end(session, "shutdown")
        self.earlier.close()
        self._allocation.close()

    def built(self, session: Session) -> None:
        """The session's memory is the decoder's from here on."""
        self.earlier.take(session.beginning, session.reservation)
        session.beginning = NEW

    @property
    def free_bytes(self) -> int:
        """Bytes of the budget that are free, or can be made free."""
        return self.budget.free + self.residents.nbytes

    @property
    def reserved_bytes(self) -> int:
        """Bytes of the budget that are taken, also by sessions that end and by local jobs, but not
        by what is kept of texts until somebody needs the room."""
        return self.budget.reserved - self.residents.nbytes

    @property
    def budget_bytes(self) -> int:
        """Bytes that sessions and local jobs may take together."""
        return self.budget.total

    @property
    def accepting(self) -> bool:
        """Whether another session may be opened now, memory aside."""
        return self._accepting and len(self._sessions) < self.max_sessions

    def sessions(self) -> list[Session]:
        """Every session that exists."""
        with self._lock:
            return list(self._sessions.values())

    def recent(self) -> list[Ended]:
        """Ended sessions, the latest last."""
        with self._lock:
            return list(self._recent)

    def _opened(self, session: Session) -> None:
        """The session's memory is there: tell who waits for it."""
        with self._lock:
            waiting = self._waiting.pop((session.opener.id, session.id), [])
        self._metrics.held_tokens.inc(session.held_tokens)
        self._events.opened(session)
        session.told()
        _answer(waiting, DataReply(session.id, True, held=session.held))

    # --- BlockSink: called from the transports' threads ----------------------------------------

    def data_key(self, client: str) -> bytes:
        with self._lock:
            key = self._keys.get(client)
        if key is None:
            raise WireError(E_CREDENTIALS, "a data connection with a ticket that is not valid")
        return key

    def attach(self, client: str, session: int, reply: Reply) -> None:
        with self._lock:
            known = self._of(client, session)
            if known is None or not known.timeline.allocated_ns:
                waits = sum(len(w) for (whose, _), w in self._waiting.items() if whose == client)
                if waits < _MAX_WAITING:
                    until = time.monotonic() + ATTACH_SECONDS
                    self._waiting.setdefault((client, session), []).append((until, reply))
                    return
                answer = DataReply(session, False, E_CAPACITY, "too many workers wait to attach")
            else:
                answer = DataReply(session, True, held=known.held)
        reply(answer)

    def detached(self, client: str, session: int) -> None:
        """See ``transport.BlockSink.detached``: what had not come will not come."""
        known = self._own(client, session)
        if known is not None and not known.complete:
            self.fail(
                known,
                E_BLOCK,
                f"the connection closed before the cache was complete: {known.missing()}",
            )

    def landing(self, client: str, header: Header) -> Landing:
        session = self._own(client, header.session)
        if session is None:
            raise WireError(E_SESSION, f"no session {header.session}")
        if not session.reservation.hold():
            raise WireError(E_SESSION, f"session {session.id} has ended")
        try:
            landing = session.landing(header)
        except BaseException:
            session.reservation.release()
            raise
        commit, abort = landing.commit, landing.abort

        def committed() -> None:
            try:
                commit()
            finally:
                session.reservation.release()
            self._metrics.kv_bytes.inc(header.payload_bytes)
            if session.completed():
                self._events.complete(session)

        def aborted() -> None:
            try:
                abort()
            finally:
                session.reservation.release()

        return Landing(landing.buffers, committed, aborted)

    def rejected(self, client: str, header: Header, code: Code, reason: str) -> None:
        """See ``transport.BlockSink.rejected``: the block's session cannot be trusted any more."""
        self._metrics.refused_blocks.labels(code).inc()
        session = self._own(client, header.session)
        if session is not None and session.phase not in (Phase.DECODING, Phase.ENDED):
            self.fail(session, code, reason)

    def _own(self, client: str, session: int) -> Session | None:
        with self._lock:
            return self._of(client, session)

    def _of(self, client: str, session: int) -> Session | None:
        """The session, if that client opened it. The lock is held."""
        known = self._sessions.get(session)
        return known if known is not None and known.opener.id == client else None


def _answer(waiting: Iterable[tuple[float, Reply]], answer: DataReply) -> None:
    for _, reply in waiting:
        reply(answer)
