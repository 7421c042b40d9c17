"""The relay: a request's first token is vLLM's, the rest are the receiver's, one response.

vLLM's own scheduler sees a handed-off request as one that may produce a single token. When that
token appears, its "length" finish is withheld; the receiver's tokens then enter vLLM's output
path as if the engine had produced them. Should the hand-off end early, for whatever reason, the
same response goes on locally: before the first token by giving the request its own limit back,
after it by a continuation request, whose prompt is everything produced so far (so that vLLM's
prefix cache answers for most of it) and whose outputs carry the first request's id.

This module is what vLLM's engine asks, with ``decisions`` on each new request and ``step_outputs``
of each step; ``answers`` is what the receiver says, ``handoffs`` what all of them work on,
``promise`` what is expected of the receiver, ``shadow`` what vLLM prefills of it when it is idle.
One lock guards the sessions.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mlx_receiver.planning.cost import Strategy
from mlx_receiver.wire import messages as m
from mlx_receiver.wire.quantised import RAW, ratio
from vllm_mac_decode.scheduler import codecs, eligibility
from vllm_mac_decode.scheduler.decisions import Decisions
from vllm_mac_decode.scheduler.handoff import Counts, Handoff, Phase
from vllm_mac_decode.scheduler.promise import Promise
from vllm_mac_decode.scheduler.step_outputs import StepOutputs
from vllm_mac_decode.scheduler.whole import opening

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from vllm_mac_decode.export import DataTarget

logger = logging.getLogger("vllm.mac_decode.relay")


class Relay(Decisions, StepOutputs):
    """Sessions of one engine, as vLLM's engine thread sees them. See the module's text."""

    # --- the engine's thread ----------------------------------------------------------------

    def on_new_request(self, request: Request) -> bool:
        """Decide who does what for the request. One that will be handed off ends after one token;
        True: it is the receiver's altogether, and vLLM's scheduler must not get it."""
        with self._lock:
            if self._shadow.owns(request.request_id):
                self._shadow.added(request.request_id)
                return False
            if self.profiling.owns(request.request_id):
                self.profiling.added(request.request_id)
                return False
            self._shadow.give_way(self.engine)
            self.profiling.busy(self.engine, time.monotonic())
            self._observing.added(request.request_id, request.num_prompt_tokens)
            if (session := self._by_request.get(request.request_id)) is not None:
                return self._came_back(session)
            decided = self._decide(request)
            if isinstance(decided, str):
                self._counts.local[decided] += 1
                logger.debug("request %s decodes locally: %s", request.request_id, decided)
                return False
            remote, sampling, plan = decided
            session = Handoff(secrets.randbits(62), request, request.max_tokens, sampling)
            session.plan = plan
            session.routed = eligibility.is_routed(request)
            taken = False
            match plan.decision.strategy:
                case Strategy.MAC:
                    taken = self._give_away(session, remote)
                case planned:
                    session.strategy = planned
            self._sessions[session.session] = session
            self._by_request[request.request_id] = session
            if taken:
                self._observing.gone(request.request_id)
            else:
                request.max_tokens = 1
            return taken

    def given_away(self, request_id: str) -> bool:
        """See ``EngineListener.given_away``."""
        with self._lock:
            session = self._by_request.get(request_id)
            return session is not None and session.whole and session.phase is Phase.DECODING

    def scheduled(self, request_id: str, cached: int = 0) -> Handoff | None:
        """The request is about to be prefilled for the first time, from its token ``cached`` on:
        open its session."""
        with self._lock:
            now = time.monotonic()
            self._shadow.scheduled(request_id, cached)
            self._computes(request_id, cached)
            self._planning.scheduled(request_id)
            session = self._by_request.get(request_id)
            if session is None or session.phase is not Phase.DECIDED:
                return None
            request, layout = session.request, self.layout
            assert layout is not None
            # Only now: it may have waited for long, and receivers come and go.
            chosen = self._chosen(request)
            if session.proof and session.receiver is not None:
                chosen = session.receiver
            if isinstance(chosen, str):
                self._counts.local[chosen] += 1
                self._part(session, chosen)
                self._give_back(session)
                return None
            assert chosen.welcome is not None
            session.enter(Phase.OPEN)
            session.receiver = chosen
            meets = session.strategy is Strategy.MEET
            compute: m.Compute = "front" if meets else "nothing"
            if not (session.proof or meets):  # what is computed beside it must fit
                planned = session.plan.decision.codec.name if session.plan is not None else RAW
                ways = codecs.allowed(self._settings.codec, chosen.welcome.codecs, layout)
                session.codec = codecs.agreed(planned, ways)
                session.ratio = ratio(layout, session.codec)
            if session.plan is not None and session.plan.expected:
                # Perhaps it is another one than was planned with.
                session.plan.expected = self._planning.homes.held(request, chosen, session.codec)
            session.home = self._planning.homes.sent(request, chosen, session.codec)
            codec = chosen.throughput.codec(session.codec, session.ratio)
            chosen.throughput.began(session.session, now, meets, codec)
            session.promise = Promise(
                session.sampling,
                request.num_prompt_tokens,
                layout,
                chosen.welcome.max_tokens,
                compute,
            )
            self._send(session, opening(session, compute))
            return session if session.pending else None

    def prefilled(self, request: Request) -> dict[str, Any]:
        """A router's prefill request is done: what the receiver must be told over HTTP to go on.

        Without a session, for whatever reason, it prefills too, but needs not tokenise.
        """
        with self._lock:
            session = self._by_request.get(request.request_id)
            unclaimed = session is not None and session.phase is Phase.OPEN
            if session is not None and unclaimed:
                session.enter(Phase.PREFILLED)
                assert session.promise is not None
                session.promise.start(time.monotonic())
                if session.promise.complete:
                    self._finish_unclaimed(session)
            return {
                "session": str(session.session) if session is not None and unclaimed else None,
                "first_token": request.output_token_ids[0],
                "prompt_token_ids": list(request.prompt_token_ids or ()),
            }

    def preempted(self, request_id: str) -> None:
        """vLLM took the request's blocks away: it starts over, locally."""
        with self._lock:
            self._shadow.preempted(request_id, self.engine)
            self._planning.forget(request_id)
            self.profiling.gone(request_id, self.engine, time.monotonic())
            self._observing.disturbed()  # nobody tells when vLLM goes on with it
            session = self._by_request.get(request_id)
            if session is not None:
                self._fall_back(session, "preempted", breaker=False)

    def unreachable(self, sessions: list[int]) -> None:
        """A worker cannot send these sessions' blocks: the receiver's data port does not answer."""
        with self._lock:
            for number in sessions:
                if (session := self._sessions.get(number)) is not None:
                    self._fall_back(session, "unreachable")

    def take_ended(self) -> list[int]:
        """Sessions that ended since the last call, for the workers."""
        with self._lock:
            ended, self._ended = self._ended, []
            self._uncounted = False
        return ended

    def targets(self, sessions: Iterable[int]) -> dict[int, DataTarget]:
        """Where workers send the blocks of these sessions, as far as their receivers are there."""
        found = {}
        with self._lock:
            for number in sessions:
                session = self._sessions.get(number)
                remote = session.receiver if session is not None else None
                target = remote.link.target if remote is not None and remote.link else None
                if target is not None:
                    found[number] = target
        return found

    def alive(self, request_id: str) -> bool:
        """Whether the request's blocks are still wanted by a receiver."""
        with self._lock:
            session = self._by_request.get(request_id)
            return session is not None and session.pending

    def has_news(self) -> bool:
        """Whether a step would tell of a session's end, by ``take_ended`` and ``take_counts``, or
        of a response that began without one."""
        with self._lock:
            return bool(self._ended) or self._uncounted

    def busy(self) -> bool:
        """Whether there are responses, or blocks for a router, that vLLM's scheduler does not
        know about."""
        with self._lock:
            return any(
                s.phase in (Phase.DECODING, Phase.PREFILLED) and not s.proof
                for s in self._sessions.values()
            ) or any(s.phase is Phase.CONTINUING for s in self._by_request.values())

    def rest(self) -> None:
        """vLLM's engine has nothing to do: it may prefill what came back from receivers."""
        now = time.monotonic()
        with self._lock:
            if self.engine is None or self._closed:
                return
            # Comparing caches comes first: responses are local until then.
            if not any(remote.owes_proof(now) for remote in self._receivers):
                self._shadow.work(self.engine, now)
                if self._shadow.resting:
                    self.profiling.work(self.engine, now)

    def steps(self) -> None:
        """vLLM's engine makes a step, which may be one for nothing but a shadow in its queue."""
        with self._lock:
            self._shadow.look(self.engine, time.monotonic())

    def cache_reset(self) -> list[str]:
        """See ``EngineListener.cache_reset``."""
        with self._lock:
            shadow = self._shadow.reset(self.engine)
            trials = self.profiling.reset(self.engine, time.monotonic())
            return [*([shadow] if shadow else []), *trials]

    def _computes(self, request_id: str, cached: int) -> None:
        """vLLM begins to compute the request, from its token ``cached`` on."""
        now = time.monotonic()
        self.profiling.scheduled(request_id, cached, now)
        self._observing.scheduled(request_id, cached, now)

    def abort(self, request_ids: list[str]) -> list[str]:
        """The client gave these requests up; returns the ids that vLLM's scheduler knows."""
        with self._lock:
            local = []
            for request_id in request_ids:
                session = self._by_request.get(request_id)
                if session is None:
                    local.append(request_id)
                    continue
                local.append(session.continued_as or request_id)
                # A continuation is forgotten when it has ended: an abort can overtake its start.
                if not session.continued_as:
                    if session.phase is Phase.DECODING:
                        self._tell_gone(session)
                    self._abort(session)
                elif session.phase is Phase.CONTINUING:
                    session.given_up = True
            return local

    def aborted(self, request_id: str) -> None:
        """vLLM's scheduler ended the request without an output, for its client or because it
        pauses or stops."""
        with self._lock:
            self._shadow.gone(request_id)
            self._planning.gone(request_id)
            self.profiling.gone(request_id, self.engine, time.monotonic())
            self._observing.gone(request_id)
            session = self._by_request.get(request_id)
            if session is None:
                return
            if request_id == session.continued_as and self.engine is not None:
                # vLLM reports the continuation's id, which no client knows. One that has left
                # does not mind.
                self.engine.emit_aborted(session.request)
            self._abort(session)

    def abort_all(self) -> None:
        """vLLM gives every request up: the same for responses that its scheduler does not know."""
        with self._lock:
            for session in list(self._sessions.values()):
                if session.phase is Phase.DECODING and self.engine is not None:
                    self.engine.emit_aborted(session.request)
                if session.phase in (Phase.DECODING, Phase.PREFILLED):
                    self._abort(session)

    def freeze(self) -> None:
        """vLLM holds every response until it is resumed: those of the receiver fall back."""
        with self._lock:
            for session in list(self._sessions.values()):
                if session.phase is Phase.DECODING:
                    self._fall_back(session, "paused", breaker=False)

    def rejects(self, request_id: str, draining: bool) -> bool | None:
        """Whether an engine that takes no new requests must reject this one; None if it is not a
        continuation of ours, which is not new: while the engine drains it goes on."""
        with self._lock:
            session = self._by_request.get(request_id)
            if session is None or request_id != session.continued_as:
                return None
            if not draining:
                self.aborted(request_id)
            return not draining

    # --- reporting --------------------------------------------------------------------------

    def take_counts(self) -> Counts:
        """What happened since the last call."""
        with self._lock:
            counts, self._counts = self._counts, Counts()
            self._shadow.settle(counts)
        return counts
