"""The relay: a request's first token is vLLM's, the rest are the receiver's, one response.

vLLM's own scheduler sees a handed-off request as one that may produce a single token. When that
token appears, its "length" finish is withheld; the receiver's tokens then enter vLLM's output
path as if the engine had produced them. Should the hand-off end early, for whatever reason, the
same response goes on locally: before the first token by giving the request its own limit back,
after it by a continuation request, whose prompt is everything produced so far (so that vLLM's
prefix cache answers for most of it) and whose outputs carry the first request's id.

This module is what vLLM's engine asks, ``answers`` what the receiver says, ``handoffs`` what both
work on, ``promise`` what is expected of the receiver. One lock guards the sessions.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mlx_receiver.wire import messages as m
from mlx_receiver.wire import trust
from vllm_mac_decode.scheduler import eligibility
from vllm_mac_decode.scheduler.answers import Answers
from vllm_mac_decode.scheduler.handoff import Counts, Handoff, Phase
from vllm_mac_decode.scheduler.promise import Promise

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
    from vllm.v1.request import Request

    from vllm_mac_decode.export import DataTarget

logger = logging.getLogger("vllm.mac_decode.relay")

#: Our key in the ``kv_transfer_params`` that routers carry to the receiver.
ROUTER_KEY = "mac_decode"

_LOWEST_LOGPROB = -9999.0  # JSON has no infinity


class Relay(Answers):
    """Sessions of one engine, as vLLM's engine thread sees them. See the module's text."""

    # --- the engine's thread ----------------------------------------------------------------

    def on_new_request(self, request: Request) -> None:
        """Decide whether the request will be handed off, and if so end it after one token."""
        with self._lock:
            if (session := self._by_request.get(request.request_id)) is not None:
                if session.phase is Phase.CONTINUING:
                    session.enter(Phase.CONTINUED)
                return
            sampling = self._decide(request)
            if isinstance(sampling, str):
                self._counts.local[sampling] += 1
                logger.debug("request %s decodes locally: %s", request.request_id, sampling)
                return
            session = Handoff(secrets.randbits(62), request, request.max_tokens, sampling)
            session.routed = eligibility.is_routed(request)
            self._sessions[session.session] = session
            self._by_request[request.request_id] = session
            request.max_tokens = 1

    def _decide(self, request: Request) -> m.Sampling | str:
        """How the receiver is to sample, or why the request decodes locally."""
        chosen = self._chosen(request.num_prompt_tokens)
        if isinstance(chosen, str):
            return chosen
        assert self.engine is not None
        reason = eligibility.local_reason(request, self._settings, self.engine.rules)
        if reason is not None:
            return reason
        if eligibility.is_routed(request):
            return m.Sampling(max_tokens=1)  # whoever decodes tells the rest
        room = self.engine.max_model_len - request.num_prompt_tokens
        sampling = eligibility.sampling(request, min(request.max_tokens, room))
        try:
            # The receiver hangs up on a client whose messages are out of range.
            trust.validated(sampling, self.vocab_size)
        except m.WireError as error:
            logger.debug("request %s: %s", request.request_id, error)
            return "out_of_range"
        return sampling

    def scheduled(self, request_id: str) -> Handoff | None:
        """The request is about to be prefilled for the first time: open its session."""
        with self._lock:
            session = self._by_request.get(request_id)
            if session is None or session.phase is not Phase.DECIDED:
                return None
            request, layout = session.request, self.layout
            assert request.prompt_token_ids is not None and layout is not None
            # Only now: it may have waited for long, and receivers come and go.
            chosen = self._chosen(request.num_prompt_tokens)
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
            session.promise = Promise(
                session.sampling,
                request.num_prompt_tokens,
                layout.nbytes(request.num_prompt_tokens),
                chosen.welcome.max_tokens,
            )
            self._send(
                session,
                m.Open(
                    session=session.session,
                    request_id=m.clipped(request.request_id, 1024),
                    prompt_token_ids=request.prompt_token_ids,
                    sampling=session.sampling,
                    unclaimed=session.routed,
                    proof=session.proof,
                ),
            )
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
        """Whether ``take_ended`` and ``take_counts`` would tell of a session's end."""
        with self._lock:
            return bool(self._ended)

    def busy(self) -> bool:
        """Whether there are responses, or blocks for a router, that vLLM's scheduler does not
        know about."""
        with self._lock:
            return any(
                s.phase in (Phase.DECODING, Phase.PREFILLED) and not s.proof
                for s in self._sessions.values()
            ) or any(s.phase is Phase.CONTINUING for s in self._by_request.values())

    def rewrite(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        """Adjust what one engine step is about to send to the clients, and to the metrics."""
        with self._lock:
            if not self._by_request:
                return
            for client, group in outputs.items():
                kept = []
                for output in group.outputs:
                    session = self._by_request.get(output.request_id)
                    if session is None or self._keep(client, session, output):
                        kept.append(output)
                group.outputs = kept
                if group.finished_requests:
                    group.finished_requests = {
                        self._reported(r) for r in group.finished_requests if not self._hidden(r)
                    }
            # A response begins to be the receiver's in a step, and its end causes one.
            elsewhere = self._elsewhere()
            for group in outputs.values():
                if group.scheduler_stats is not None:
                    group.scheduler_stats.num_running_reqs += elsewhere

    def _elsewhere(self) -> int:
        """Responses that run, although vLLM's scheduler does not know them."""
        return sum(s.phase is Phase.DECODING for s in self._sessions.values()) + sum(
            s.phase is Phase.CONTINUING
            for name, s in self._by_request.items()
            if name == s.continued_as
        )

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
                    self._abort(session)
            return local

    def aborted(self, request_id: str) -> None:
        """vLLM's scheduler ended the request without an output, for its client or because it
        pauses or stops."""
        with self._lock:
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

    # --- both threads, with the lock --------------------------------------------------------

    def _keep(self, client: int, session: Handoff, output: EngineCoreOutput) -> bool:
        """Whether the step's output goes out with the step. False: it was sent from here."""
        assert self.engine is not None
        if session.proof:
            self._keep_proof(session, output)
            return False
        if session.routed:
            self._keep_prefilled(session, output)
            return True
        if session.continued_as:
            if output.request_id != session.continued_as:
                return True
            self.engine.continue_output(output, session.request_id)
            if output.finish_reason is not None:
                self._forget(session)
            return True
        session.tokens += output.new_token_ids
        if output.finish_reason is None:
            return True
        limit = self.engine.is_length(output) and len(session.tokens) < session.max_tokens
        room = self.engine.max_model_len - session.request.num_prompt_tokens
        if not limit or len(session.tokens) >= room:
            # Finished by itself: a stop token, an error, or the client's own limit.
            if session.pending:
                self._part(session, "finished at the first token")
            self._forget(session)
            return True
        output.finish_reason = None
        session.first_token_at = time.monotonic()
        # Sent from here, so that it is in the queue before the receiver can answer.
        self.engine.emit(client, [output])
        if not session.pending:
            self._continue_locally(session)
        else:
            session.enter(Phase.DECODING)
            assert session.promise is not None
            session.promise.start(session.first_token_at)
            self._send(session, m.Start(session.session, session.tokens[-1]))
        return False

    def _keep_prefilled(self, session: Handoff, output: EngineCoreOutput) -> None:
        if output.finish_reason is None:
            return
        self._by_request.pop(session.request_id, None)
        if session.phase in (Phase.DECIDED, Phase.OPEN):
            self._part(session, "the prefill failed")
            session.enter(Phase.OVER)
        if output.kv_transfer_params and output.new_logprobs is not None:
            # The router throws the first token's own response away.
            ids, values, ranks, *_ = output.new_logprobs
            output.kv_transfer_params[ROUTER_KEY]["logprobs"] = {
                "token_ids": [int(token) for token in ids[0]],
                "values": [max(float(value), _LOWEST_LOGPROB) for value in values[0]],
                "rank": int(ranks[0]),
            }

    def _keep_proof(self, session: Handoff, output: EngineCoreOutput) -> None:
        """Nobody waits for the output; the receiver compares once it has all."""
        if output.finish_reason is None:
            return
        if session.phase is Phase.OPEN and output.new_token_ids:
            session.enter(Phase.PREFILLED)
            assert session.promise is not None
            session.promise.start(time.monotonic())
            self._send(session, m.Start(session.session, output.new_token_ids[-1]))
            return
        self._fall_back(session, "vLLM did not compute it")
        self._forget(session)

    def _hidden(self, request_id: str) -> bool:
        session = self._by_request.get(request_id)
        return session is not None and request_id != session.continued_as

    def _reported(self, request_id: str) -> str:
        session = self._by_request.get(request_id)
        return session.request_id if session is not None else request_id

    # --- reporting --------------------------------------------------------------------------

    def take_counts(self) -> Counts:
        """What happened since the last call."""
        with self._lock:
            counts, self._counts = self._counts, Counts()
        return counts
