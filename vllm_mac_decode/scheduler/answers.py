"""What the receiver says, and what becomes of it: tokens for vLLM's output path, or the end of a
hand-off. Everything passes the session's ``Promise`` first.
"""

from __future__ import annotations

import logging
import secrets
import time
from typing import TYPE_CHECKING

import msgspec

from mlx_receiver.planning.cost import Strategy
from mlx_receiver.wire import messages as m
from mlx_receiver.wire.sampling import Sampling
from mlx_receiver.wire.seldom import Seldom, printable
from vllm_mac_decode.scheduler.handoff import Handoff, Phase
from vllm_mac_decode.scheduler.link import Unusable
from vllm_mac_decode.scheduler.promise import BrokenPromise, Promise
from vllm_mac_decode.scheduler.remote import Remote
from vllm_mac_decode.scheduler.whole import Whole
from vllm_mac_decode.settings import Settings

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = logging.getLogger("vllm.mac_decode.relay")

#: Seconds after which the KV for a router is given up. This side does not hear of its progress any
#: more once another has claimed the session.
_LEASE_SECONDS = 60.0


class Answers(Whole):
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
            self._planning.homes.leave(remote)

    def close(self) -> None:
        """There are no receivers any more, and will be none: what was decided is taken back."""
        with self._lock:
            self._closed = True
            self._shadow.clear()
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
            if remote.process != welcome.receiver:
                remote.process = welcome.receiver
                self._planning.homes.restarted(remote)
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
                    self._decoded(remote, message.decoded, arrived)
                    self._paced(remote, message.decoded)
                case m.Status():
                    remote.heard(message)
                    for progress in message.sessions:
                        self._told(remote, progress)
                case m.Opened() | m.Refused() | m.Complete() | m.Proven() | m.Failed():
                    self._told(remote, message)
                case _:
                    pass

    def look(self, remote: Remote, now: float) -> None:
        """See how fast the way to it is, for its link's thread."""
        with self._lock:
            remote.look(now)

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
            self._shadow.look(self.engine, now)
            self.profiling.look(self.engine, now, any(remote.proven for remote in self._receivers))
            for session in list(self._sessions.values()):
                self._catch_up(session)
                promise = session.promise
                if session.early:
                    continue  # it waits for vLLM
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
                    if message.state == "queued":
                        session.begun_at = now
                case m.Opened():
                    promise.opened(message)
                    if session.proof and message.held.tokens:
                        raise BrokenPromise("it holds part of what it is to compare")
                    self._counts.events["held_tokens"] += message.held.tokens
                    if session.plan is not None and not session.whole:  # ``Complete`` tells then
                        remote.held(message.held.tokens, session.plan.expected)
                case m.Complete():
                    promise.completed(message, now)
                    self._counts.events["kv_bytes"] += message.kv_bytes
                    remote.throughput.complete(session.session, message.kv_bytes, now)
                    if session.strategy is Strategy.MEET:
                        self._counts.events["computed_bytes"] += message.computed_bytes
                        self._tell_workers(session)  # what has not left yet is not wanted
                    if session.whole:
                        self._counts.events["computed_tokens"] += message.computed
                        self._counts.events["held_tokens"] += session.cached
                        if session.plan is not None:
                            remote.held(session.cached, session.plan.expected)
                    if session.phase is Phase.PREFILLED and not session.proof:
                        self._finish_unclaimed(session)
                case m.Proven():
                    self._compared(remote, session, message)
                case m.Refused():
                    promise.refused(message)
                    self._failed(session, f"refused_{message.code}", message)
                case m.Failed():
                    # What it cannot do for this request says nothing about others.
                    fault = message.code != m.E_UNSUPPORTED
                    self._failed(session, f"failed_{message.code}", message, breaker=fault)
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
            session = Handoff(secrets.randbits(62), request, 1, Sampling(max_tokens=1))
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

    def _failed(
        self, session: Handoff, cause: str, message: m.Refused | m.Failed, breaker: bool = False
    ) -> None:
        reason = printable(message.reason)
        if message.code == m.E_UNSUPPORTED:
            self._complaints.warning(
                "the receiver cannot decode request %s, which goes on locally: %s",
                session.request_id,
                reason,
            )
        else:
            logger.debug("session of %s: %s", session.request_id, reason)
        self._fall_back(session, cause, breaker)

    def _broken(self, session: Handoff, error: BrokenPromise) -> None:
        self._complaints.warning(
            "the receiver broke the protocol in the session of %s: %s; "
            "the response goes on locally",
            session.request_id,
            error,
        )
        self._fall_back(session, "failed_protocol")

    def _decoded(self, remote: Remote, step: list[m.Decoded], arrived: float = 0.0) -> None:
        """Send on what a step brought that came when ``perf_counter`` was at ``arrived``."""
        now = time.monotonic()
        produced: dict[int, tuple[Request, m.Decoded]] = {}
        # What follows from them is done once the tokens are on their way: nothing holds them up,
        # and what ends a response does not overtake them.
        taken: list[tuple[Handoff, m.Decoded]] = []
        broken: list[tuple[Handoff, BrokenPromise]] = []
        ending: list[tuple[Handoff, str]] = []
        for decoded in step:
            found = self._of(remote, decoded.session)
            if found is None:
                continue
            session, promise = found
            grammar = session.sampling.grammar
            if grammar is not None and self._too_early(session, decoded):
                continue
            try:
                if session.proof:
                    raise BrokenPromise("it decoded what it was to compare")
                if decoded.session in produced:
                    raise BrokenPromise("it sent two parts of one step")
                context_full = promise.decoded(decoded, session.tokens, now)
            except BrokenPromise as error:
                broken.append((session, error))
                continue
            if grammar is not None:
                assert self.engine is not None
                tokens = decoded.token_ids
                accepted = self.engine.accept(session.request, tokens, grammar.after)
                if accepted < len(tokens):
                    # Two libraries read a grammar in two ways: vLLM goes on from where they part.
                    decoded, context_full = _shortened(decoded, accepted), False
                    ending.append((session, "grammar"))
            if session.whole:
                self._begin_text(session, decoded)
            elif len(session.tokens) == 1:
                self._counts.handoff_gaps.append(now - session.first_token_at)
            session.tokens += decoded.token_ids
            if context_full:
                decoded = msgspec.structs.replace(decoded, finish="")
                ending.append((session, "context"))
            if decoded.token_ids or decoded.finish:
                produced[decoded.session] = (session.request, decoded)
            taken.append((session, decoded))
        if produced:
            assert self.engine is not None
            self.engine.emit_decoded(list(produced.values()))
        if arrived:
            self._counts.relay_times.append(time.perf_counter() - arrived)
        for session, decoded in taken:
            self._counts.events["tokens"] += len(decoded.token_ids)
            if decoded.finish:
                self._finished(remote, session, now)
            elif self.engine is not None:
                self._shadow.grown(session.session, self.engine)
        for session, problem in broken:
            if session.pending:
                self._broken(session, problem)
        for session, cause in ending:
            self._fall_back(session, cause, breaker=False)

    def _finished(self, remote: Remote, session: Handoff, now: float) -> None:
        """The receiver's part of the text was its end."""
        self._counts.events["completed"] += 1
        remote.succeeded()
        self._tell_workers(session)
        if session.plan is not None:
            tokens, rate = len(session.tokens), remote.throughput.link.rate
            self._note(self._planning.finished(session.plan, tokens, rate, now))
        self._forget(session)

    def _paced(self, remote: Remote, step: list[m.Decoded]) -> None:
        """See how fast the receiver decodes, once the tokens are on their way."""
        now = time.monotonic()
        sessions = tokens = context = 0
        for decoded in step:
            session = self._sessions.get(decoded.session)
            if session is None or decoded.finish:
                sessions = 0  # the next step is of other texts
                break
            sessions += 1
            tokens += len(decoded.token_ids)
            context += session.request.num_prompt_tokens + len(session.tokens)
        if not sessions or self._computes_prompts(remote):
            remote.pace.step(0, 0, 0, 0, now, remote.speed)
            return
        remote.pace.step(
            sessions, remote.others, tokens, (context - tokens) // sessions, now, remote.speed
        )

    def _computes_prompts(self, remote: Remote) -> bool:
        """Whether it may compute a prompt of ours between its steps, which then take longer."""
        return any(
            s.receiver is remote and s.promise is not None and not s.promise.complete
            for s in self._sessions.values()
            if s.strategy in (Strategy.MAC, Strategy.MEET)
        )


def _shortened(decoded: m.Decoded, tokens: int) -> m.Decoded:
    """Its first tokens, behind which the text goes on."""
    rows = decoded.logprobs and decoded.logprobs[:tokens]
    return m.Decoded(
        decoded.session, decoded.position, decoded.token_ids[:tokens], logprobs=rows or None
    )
