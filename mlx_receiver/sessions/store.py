"""The sessions that exist, the memory they may take, and the blocks that arrive for them."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Protocol

from mlx_receiver.caches import memory
from mlx_receiver.caches.memory import Budget
from mlx_receiver.caches.model import ModelCache
from mlx_receiver.metrics import Metrics
from mlx_receiver.sessions.session import Ended, Owner, Phase, Session
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
    Sampling,
    WireError,
)

logger = logging.getLogger(__name__)

#: Seconds that a worker's ATTACH waits for the Open of its session on the other channel.
ATTACH_SECONDS: Final = 5.0

#: Seconds without a block after which a started session with a hole is given up.
STALL_SECONDS: Final = 15.0

#: The same for a session that nothing has started yet: vLLM may be computing a long step.
IDLE_SECONDS: Final = 30.0

#: Seconds after its last block in which an unclaimed session must be claimed.
LEASE_SECONDS: Final = 30.0

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
    ) -> None:
        self._cache: ModelCache | None = None
        self.budget = Budget()
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
        # Zeroing gigabytes takes a while: neither the control nor the decoding thread may wait.
        self._allocator = ThreadPoolExecutor(1, thread_name_prefix="kv-allocate")
        self._accepting = True

    def configure(self, cache: ModelCache, budget_bytes: int) -> None:
        """What is known once the model is loaded; until then nothing is admitted."""
        self._cache = cache
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

    def open(self, message: Open, client: Owner, layout: CacheLayout) -> Session:
        """Reserve a session's memory in the client's ``layout``; ``SessionEvents.opened`` follows
        when it is allocated.

        Raises WireError: ``capacity`` when it does not fit, ``session`` for an id in use.
        """
        tokens = len(message.prompt_token_ids)
        # Whoever claims an unclaimed session says only then how much text it may become.
        headroom = memory.HEADROOM
        if not message.unclaimed:
            headroom = min(message.sampling.max_tokens, headroom)
        marks = layout.cells(tokens)
        with self._lock:
            if message.session in self._sessions:
                raise WireError(E_SESSION, f"session {message.session} exists already")
            if not self._accepting:
                raise WireError(E_CAPACITY, "the receiver is stopping")
            if len(self._sessions) >= self.max_sessions:
                raise WireError(
                    E_CAPACITY, f"{len(self._sessions)} sessions are open (--max-sessions)"
                )
            owners = {s.opener.id for s in self._sessions.values()}
            # Some of the last places are for clients that have none.
            kept = min(len(self._keys.keys() - owners), self.max_sessions // 4)
            if client.id in owners and len(self._sessions) >= self.max_sessions - kept:
                raise WireError(
                    E_CAPACITY,
                    f"{len(self._sessions)} sessions are open, and {kept} of {self.max_sessions} "
                    "are kept for other clients (--max-sessions)",
                )
            reservation = self.budget.reserve(tokens, headroom, layout.itemsize, marks)
            session = Session(message, client, layout, reservation)
            self._sessions[session.id] = session
            reservation.hold()  # for the allocating thread
        self._allocator.submit(self._allocate, session, headroom)
        return session

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
        """Answer attaches that waited too long; give up sessions that have come to nothing: whose
        last blocks never came, for which nothing comes, and unclaimed ones that nobody wants."""
        now = time.monotonic()
        with self._lock:
            late = {
                (client, session): replies
                for (client, session), replies in self._waiting.items()
                if self._of(client, session) is None and replies[0][0] < now
            }
            for key in late:
                del self._waiting[key]
            stalled = [
                s
                for s in self._sessions.values()
                if s.first_token is not None
                and not s.complete
                and s.last_progress + STALL_SECONDS < now
            ]
            idle = [
                s
                for s in self._sessions.values()
                if s.first_token is None
                and not s.unclaimed
                and s.last_progress + IDLE_SECONDS < now
            ]
            unclaimed = [
                s
                for s in self._sessions.values()
                if s.unclaimed and s.last_progress + LEASE_SECONDS < now
            ]
        for (_, session_id), replies in late.items():
            _answer(replies, DataReply(session_id, False, E_SESSION, "no such session was opened"))
        for session in stalled:
            self.fail(
                session,
                E_BLOCK,
                f"no block came for {STALL_SECONDS:.0f} s, but the cache is incomplete: "
                f"{session.missing()}",
            )
        for session in idle:
            self.fail(session, E_SESSION, f"no block and no Start came for {IDLE_SECONDS:.0f} s")
        for session in unclaimed:
            self.fail(session, E_SESSION, f"nobody claimed it within {LEASE_SECONDS:.0f} s")

    def close(self) -> None:
        """Accept nothing any more and end every session."""
        with self._lock:
            self._accepting = False
            sessions = list(self._sessions.values())
        for session in sessions:
            self.end(session, "shutdown")
        self._allocator.shutdown(wait=False, cancel_futures=True)

    @property
    def free_bytes(self) -> int:
        """Bytes of the budget that nothing is reserved in."""
        return self.budget.free

    @property
    def reserved_bytes(self) -> int:
        """Bytes of the budget that are taken, also by sessions that end and by local jobs."""
        return self.budget.reserved

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

    def _allocate(self, session: Session, headroom: int) -> None:
        try:
            self._give_memory(session, headroom)
        finally:
            session.reservation.release()

    def _give_memory(self, session: Session, headroom: int) -> None:
        try:
            assert self._cache is not None  # or there would be no memory to reserve
            buffers = self._cache.allocate(session.layout, session.tokens, headroom)
        except Exception as error:
            logger.exception("allocating session %s failed", session.id)
            self.fail(session, E_CAPACITY, f"allocating its KV memory failed: {error}")
            return
        if not session.give_memory(buffers):
            return
        with self._lock:
            waiting = self._waiting.pop((session.opener.id, session.id), [])
        self._events.opened(session)
        _answer(waiting, DataReply(session.id, True))
        try:
            while session.memory_grew() and buffers.grow():
                pass
        except Exception as error:
            logger.exception("allocating session %s failed", session.id)
            self.fail(session, E_CAPACITY, f"allocating its KV memory failed: {error}")

    # --- BlockSink: called from the transports' threads ----------------------------------------

    def data_key(self, client: str) -> bytes:
        """See ``transport.BlockSink.data_key``."""
        with self._lock:
            key = self._keys.get(client)
        if key is None:
            raise WireError(E_CREDENTIALS, "a data connection with a ticket that is not valid")
        return key

    def attach(self, client: str, session: int, reply: Reply) -> None:
        """See ``transport.BlockSink.attach``."""
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
                answer = DataReply(session, True)
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
        """See ``transport.BlockSink.landing``."""
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
