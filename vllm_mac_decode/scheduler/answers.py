"""What the receiver says, and what becomes of it: tokens for vLLM's output path, or the end of a
hand-off. Everything passes the session's ``Promise`` first.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import msgspec

from mlx_receiver.wire import messages as m
from mlx_receiver.wire.seldom import Seldom, printable
from vllm_mac_decode.scheduler.handoff import Handoff, Phase
from vllm_mac_decode.scheduler.handoffs import Handoffs
from vllm_mac_decode.scheduler.promise import BrokenPromise
from vllm_mac_decode.settings import Settings

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = logging.getLogger("vllm.mac_decode.relay")

#: Seconds after which the KV for a router is given up. This side does not hear of its progress any
#: more once another has claimed the session.
_LEASE_SECONDS = 60.0


class Answers(Handoffs):
    """The ``LinkListener`` half of the relay; called from the link's thread."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._complaints = Seldom(logger)

    def connected(self, welcome: m.Welcome) -> None:
        """Sessions open as requests come."""
        with self._lock:
            self._available.connected(welcome)

    def disconnected(self, reason: str) -> None:
        """Every session that the receiver had is lost."""
        with self._lock:
            self._available.connected(None)
            if self._sessions:
                self._available.failed()
            for session in list(self._sessions.values()):
                self._fall_back(session, "lost", breaker=False)

    def message(self, message: m.ReceiverMessage, arrived: float) -> None:
        """Act on what the receiver says; what it says of unknown sessions is ignored."""
        with self._lock:
            match message:
                case m.Step():
                    self._decoded(message.decoded)
                    self._counts.relay_times.append(time.perf_counter() - arrived)
                case m.Status():
                    self._available.accepting = message.accepting
                    for progress in message.sessions:
                        self._told(progress)
                case m.Opened() | m.Refused() | m.Complete() | m.Failed():
                    self._told(message)
                case _:
                    pass

    def tick(self, now: float) -> None:
        """Give up sessions that have made no progress for too long."""
        with self._lock:
            for session in list(self._sessions.values()):
                promise = session.promise
                if promise is None or session.phase not in (Phase.DECODING, Phase.PREFILLED):
                    continue
                routed = session.phase is Phase.PREFILLED
                stall = _LEASE_SECONDS if routed else self._settings.stall_timeout
                cause = promise.overdue(now, stall, self._settings.queue_timeout)
                if cause:
                    self._fall_back(session, cause, breaker=cause == "stalled")

    def _told(self, message: m.Opened | m.Refused | m.Complete | m.Failed | m.Progress) -> None:
        """What the receiver says of one session."""
        session = self._sessions.get(message.session)
        promise = session.promise if session is not None else None
        if session is None or promise is None:
            return
        now = time.monotonic()
        try:
            match message:
                case m.Progress():
                    promise.progress(message, now)
                case m.Opened():
                    promise.opened(message)
                case m.Complete():
                    promise.completed(message, now)
                    self._counts.events["kv_bytes"] += message.kv_bytes
                    if session.phase is Phase.PREFILLED:
                        self._finish_unclaimed(session)
                case m.Refused():
                    promise.refused(message)
                    self._failed(session, f"refused_{message.code}", message.reason)
                case m.Failed():
                    self._failed(session, f"failed_{message.code}", message.reason, breaker=True)
        except BrokenPromise as error:
            self._broken(session, error)

    def _failed(self, session: Handoff, cause: str, reason: str, breaker: bool = False) -> None:
        logger.debug("session of %s: %s", session.request_id, printable(reason))
        self._fall_back(session, cause, breaker)

    def _broken(self, session: Handoff, error: BrokenPromise) -> None:
        self._complaints.warning(
            "the receiver broke the protocol in the session of %s: %s; "
            "the response goes on locally",
            session.request_id,
            error,
        )
        self._fall_back(session, "failed_protocol")

    def _decoded(self, step: list[m.Decoded]) -> None:
        now = time.monotonic()
        produced: dict[int, tuple[Request, m.Decoded]] = {}
        # Given up once their tokens, if there are any, are on their way: what ends the response
        # must not overtake them.
        broken: list[tuple[Handoff, BrokenPromise]] = []
        full: list[Handoff] = []
        for decoded in step:
            session = self._sessions.get(decoded.session)
            if session is None or session.promise is None:
                continue
            try:
                if decoded.session in produced:
                    raise BrokenPromise("it sent two parts of one step")
                context_full = session.promise.decoded(decoded, session.tokens, now)
            except BrokenPromise as error:
                broken.append((session, error))
                continue
            if len(session.tokens) == 1:
                self._counts.handoff_gaps.append(now - session.first_token_at)
            session.tokens += decoded.token_ids
            self._counts.events["tokens"] += len(decoded.token_ids)
            if context_full:
                decoded = msgspec.structs.replace(decoded, finish="")
                full.append(session)
            if decoded.token_ids or decoded.finish:
                produced[decoded.session] = (session.request, decoded)
            if decoded.finish:
                self._counts.events["completed"] += 1
                self._available.succeeded()
                self._tell_workers(session)
                self._forget(session)
        if produced:
            assert self.engine is not None
            self.engine.emit_decoded(list(produced.values()))
        for session, problem in broken:
            self._broken(session, problem)
        for session in full:
            self._fall_back(session, "context", breaker=False)
