"""What the receiver says, and what becomes of it: tokens for vLLM's output path, or the end of a
hand-off. Everything passes the session's ``Promise`` first.
"""

from __future__ import annotations

import logging
import secrets
import time
from typing import TYPE_CHECKING

import msgspec

from mlx_receiver.wire import messages as m
from mlx_receiver.wire.seldom import Seldom, printable
from vllm_mac_decode.scheduler.handoff import Handoff, Phase
from vllm_mac_decode.scheduler.handoffs import Handoffs
from vllm_mac_decode.scheduler.link import Unusable
from vllm_mac_decode.scheduler.promise import BrokenPromise, Promise
from vllm_mac_decode.scheduler.remote import Remote
from vllm_mac_decode.settings import Settings

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = logging.getLogger("vllm.mac_decode.relay")

#: Seconds after which the KV for a router is given up. This side does not hear of its progress any
#: more once another has claimed the session.
_LEASE_SECONDS = 60.0


class Answers(Handoffs):
    """The half of the relay that the receivers' links call, each from its own thread."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._complaints = Seldom(logger)

    def join(self) -> Remote:
        """A receiver that may be connected now and then."""
        remote = Remote(self)
        with self._lock:
            self._receivers.append(remote)
        return remote

    def leave(self, remote: Remote) -> None:
        """It will not be any more."""
        with self._lock:
            self.disconnected(remote)
            self._receivers.remove(remote)

    def close(self) -> None:
        """There are no receivers any more, and will be none: what was decided is taken back."""
        with self._lock:
            self._closed = True
            for remote in self._receivers:
                self.disconnected(remote)
            for session in list(self._sessions.values()):
                self._fall_back(session, "lost", breaker=False)

    def taken(self, receiver: str, remote: Remote) -> bool:
        """Whether another link is connected to that receiver."""
        with self._lock:
            return any(
                other.welcome is not None and other.welcome.receiver == receiver
                for other in self._receivers
                if other is not remote
            )

    def connected(self, remote: Remote, welcome: m.Welcome) -> bool:
        """Sessions open as requests come, unless another link is connected to it."""
        with self._lock:
            if self._closed or self.taken(welcome.receiver, remote):
                return False
            remote.enter(welcome)
            remote.proven = remote.proven or not self._settings.proof
            return True

    def disconnected(self, remote: Remote) -> None:
        """Every session that the receiver had is lost."""
        with self._lock:
            remote.enter(None)
            lost = [s for s in self._sessions.values() if s.receiver is remote]
            if lost:
                remote.failed()
            for session in lost:
                self._fall_back(session, "lost", breaker=False)

    def message(self, remote: Remote, message: m.ReceiverMessage, arrived: float) -> None:
        """Act on what the receiver says; what it says of sessions that it does not have is
        ignored."""
        with self._lock:
            match message:
                case m.Step():
                    self._decoded(remote, message.decoded)
                    self._counts.relay_times.append(time.perf_counter() - arrived)
                case m.Status():
                    remote.heard(message)
                    for progress in message.sessions:
                        self._told(remote, progress)
                case m.Opened() | m.Refused() | m.Complete() | m.Proven() | m.Failed():
                    self._told(remote, message)
                case _:
                    pass

    def idle(self, remote: Remote) -> bool:
        """Whether no hand-off to it is under way."""
        with self._lock:
            return all(session.receiver is not remote for session in self._sessions.values())

    def _of(self, remote: Remote, number: int) -> tuple[Handoff, Promise] | None:
        """The session of that number, if the receiver has it."""
        session = self._sessions.get(number)
        if session is None or session.promise is None or session.receiver is not remote:
            return None
        return session, session.promise

    def tick(self, now: float) -> None:
        """Give up sessions that have made no progress for too long; compare caches while vLLM has
        nothing else to do."""
        with self._lock:
            self._prove(now)
            for session in list(self._sessions.values()):
                promise = session.promise
                if promise is None or session.phase not in (Phase.DECODING, Phase.PREFILLED):
                    continue
                routed = session.phase is Phase.PREFILLED
                stall = _LEASE_SECONDS if routed else self._settings.stall_timeout
                cause = promise.overdue(now, stall, self._settings.queue_timeout)
                if cause:
                    self._fall_back(session, cause, breaker=cause == "stalled")

    def _told(
        self,
        remote: Remote,
        message: m.Opened | m.Refused | m.Complete | m.Proven | m.Failed | m.Progress,
    ) -> None:
        """What the receiver says of one session."""
        found = self._of(remote, message.session)
        if found is None:
            return
        session, promise = found
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
                    if session.phase is Phase.PREFILLED and not session.proof:
                        self._finish_unclaimed(session)
                case m.Proven():
                    self._compared(remote, session, message)
                case m.Refused():
                    promise.refused(message)
                    self._failed(session, f"refused_{message.code}", message.reason)
                case m.Failed():
                    self._failed(session, f"failed_{message.code}", message.reason, breaker=True)
        except BrokenPromise as error:
            self._broken(session, error)

    def _prove(self, now: float) -> None:
        """Let receivers whose cache was not compared do that, of a prompt of nobody's."""
        engine = self.engine
        if engine is None or engine.rules.everything or engine.weights_changed:
            return
        if not self._settings.enabled:
            return
        comparing = [s.receiver for s in self._by_request.values() if s.proof]
        for remote in self._receivers:
            if not remote.owes_proof(now) or remote in comparing or not engine.idle:
                continue
            assert remote.welcome is not None
            remote.compares(now)
            most = min(engine.max_model_len, remote.welcome.max_tokens) - 2
            tokens = remote.welcome.proof_token_ids[: max(0, most)]
            if not tokens:
                continue  # no text would fit: nothing can be handed off either
            request = engine.prefill(f"mac-decode-proof-{secrets.token_hex(8)}", tokens)
            session = Handoff(secrets.randbits(62), request, 1, m.Sampling(max_tokens=1))
            session.proof, session.receiver = True, remote
            self._sessions[session.session] = session
            self._by_request[session.request_id] = session
            return  # the engine is not idle any more

    def _compared(self, remote: Remote, session: Handoff, message: m.Proven) -> None:
        """Raises BrokenPromise, and Unusable when the two engines' caches differ."""
        if not session.proof or session.phase is not Phase.PREFILLED:
            raise BrokenPromise("it compared a cache that nobody asked it to")
        self._tell_workers(session)
        self._forget(session)
        text = printable(message.text)
        if not message.same:
            raise Unusable(text)
        remote.prove()
        where = remote.link.where if remote.link is not None else ""
        logger.info("the receiver at %s computes the same cache: %s", where, text)

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

    def _decoded(self, remote: Remote, step: list[m.Decoded]) -> None:
        now = time.monotonic()
        produced: dict[int, tuple[Request, m.Decoded]] = {}
        # Given up once their tokens, if there are any, are on their way: what ends the response
        # must not overtake them.
        broken: list[tuple[Handoff, BrokenPromise]] = []
        full: list[Handoff] = []
        for decoded in step:
            found = self._of(remote, decoded.session)
            if found is None:
                continue
            session, promise = found
            try:
                if session.proof:
                    raise BrokenPromise("it decoded what it was to compare")
                if decoded.session in produced:
                    raise BrokenPromise("it sent two parts of one step")
                context_full = promise.decoded(decoded, session.tokens, now)
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
                remote.succeeded()
                self._tell_workers(session)
                self._forget(session)
        if produced:
            assert self.engine is not None
            self.engine.emit_decoded(list(produced.values()))
        for session, problem in broken:
            self._broken(session, problem)
        for session in full:
            self._fall_back(session, "context", breaker=False)
