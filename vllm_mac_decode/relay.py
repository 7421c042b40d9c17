"""The relay: a request's first token is vLLM's, the rest are the receiver's, one response.

vLLM's own scheduler sees a handed-off request as one that may produce a single token. When that
token appears, its "length" finish is withheld; the receiver's tokens then enter vLLM's output
path as if the engine had produced them. Should the hand-off end early, for whatever reason, the
same response goes on locally: before the first token by giving the request its own limit back,
after it by a continuation request, whose prompt is everything produced so far (so that vLLM's
prefix cache answers for most of it) and whose outputs carry the first request's id.

Called from the engine's thread and from the link's; one lock guards the sessions.
"""

from __future__ import annotations

import secrets
import threading
import time
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from mlx_receiver.wire import messages as m
from vllm_mac_decode import policy
from vllm_mac_decode.breaker import CircuitBreaker
from vllm_mac_decode.engine_seam import EngineSeam
from vllm_mac_decode.link import Link
from vllm_mac_decode.session import Counts, Session
from vllm_mac_decode.settings import Settings

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
    from vllm.v1.request import Request

logger = init_logger("vllm.mac_decode.relay")

#: Our key in the ``kv_transfer_params`` that routers carry to the receiver.
ROUTER_KEY = "mac_decode"

_LOWEST_LOGPROB = -9999.0  # JSON has no infinity


class Relay:
    """Sessions of one engine. See the module's text."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.RLock()
        self._sessions: dict[int, Session] = {}
        self._by_request: dict[str, Session] = {}
        self._ended: list[int] = []
        self._counts = Counts()
        self._breaker = CircuitBreaker()
        self.link: Link | None = None
        self.seam: EngineSeam | None = None

    # --- the engine's thread ----------------------------------------------------------------

    def on_new_request(self, request: Request) -> None:
        """Decide whether the request will be handed off, and if so end it after one token."""
        if (session := self._by_request.get(request.request_id)) is not None:
            session.queued = False  # it is our continuation
            return
        reason = self._unavailable()
        if reason is None and self.seam is not None:
            reason = policy.local_reason(request, self._settings, self.seam.rules)
        with self._lock:
            if reason is not None:
                self._counts.local[reason] += 1
                logger.debug("request %s decodes locally: %s", request.request_id, reason)
                return
            session = Session(secrets.randbits(62), request, request.max_tokens)
            session.parked = policy.is_routed(request)
            self._sessions[session.session] = session
            self._by_request[request.request_id] = session
            request.max_tokens = 1

    def scheduled(self, request_id: str) -> Session | None:
        """The request is about to be prefilled for the first time: open its session."""
        with self._lock:
            session = self._by_request.get(request_id)
            if session is None or session.asked or session.ended or session.continued_as:
                return None
            session.asked = True
            assert self.link is not None
            request = session.request
            assert request.prompt_token_ids is not None
            assert self.seam is not None
            room = self.seam.max_model_len - len(request.prompt_token_ids)
            self._send(
                m.Open(
                    session=session.session,
                    request_id=request.request_id,
                    prompt_token_ids=request.prompt_token_ids,
                    sampling=m.Sampling(max_tokens=1)
                    if session.parked
                    else policy.sampling(request, min(session.max_tokens, room)),
                    parked=session.parked,
                )
            )
            return session

    def prefilled(self, request: Request) -> dict[str, Any]:
        """A router's prefill request is done: what the receiver must be told over HTTP to go on.

        Without a session, for whatever reason, it prefills too, but needs not tokenise.
        """
        with self._lock:
            session = self._by_request.get(request.request_id)
            parked = session is not None and session.asked and not session.ended
            if session is not None and parked:
                session.handed_on = True
                if session.kv_complete:
                    self._finish_parked(session)
            return {
                "session": str(session.session) if session is not None and parked else None,
                "first_token": request.output_token_ids[0],
                "prompt_token_ids": list(request.prompt_token_ids or ()),
            }

    def preempted(self, request_id: str) -> None:
        """vLLM took the request's blocks away: it starts over, locally."""
        with self._lock:
            session = self._by_request.get(request_id)
            if session is not None:
                self._give_up(session, "preempted", breaker=False)

    def take_ended(self) -> list[int]:
        """Sessions that ended since the last call, for the workers."""
        with self._lock:
            ended, self._ended = self._ended, []
        return ended

    def alive(self, request_id: str) -> bool:
        """Whether the request's blocks are still wanted by a receiver."""
        with self._lock:
            session = self._by_request.get(request_id)
            return session is not None and not session.ended

    def has_news(self) -> bool:
        """Whether ``take_ended`` and ``take_counts`` would tell of a session's end."""
        with self._lock:
            return bool(self._ended)

    def busy(self) -> bool:
        """Whether there are responses, or blocks for a router, that vLLM's scheduler does not
        know about."""
        with self._lock:
            return any(s.started or s.handed_on for s in self._sessions.values()) or any(
                s.queued for s in self._by_request.values()
            )

    def rewrite(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        """Adjust what one engine step is about to send to the clients."""
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
            if request_id == session.continued_as and self.seam is not None:
                # vLLM reports the continuation's id, which no client knows. One that has left
                # does not mind.
                self.seam.emit_aborted(session.request)
            self._abort(session)

    def abort_all(self) -> None:
        """vLLM gives every request up: the same for responses that its scheduler does not know."""
        with self._lock:
            for session in list(self._sessions.values()):
                if session.started and self.seam is not None:
                    self.seam.emit_aborted(session.request)
                if session.started or session.handed_on:
                    self._abort(session)

    def freeze(self) -> None:
        """vLLM holds every response until it is resumed: those of the receiver come home."""
        with self._lock:
            for session in list(self._sessions.values()):
                if session.started:
                    self._give_up(session, "paused", breaker=False)

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

    def _keep(self, client: int, session: Session, output: EngineCoreOutput) -> bool:
        """Whether the step's output goes out with the step. False: it was sent from here."""
        assert self.seam is not None
        if session.parked:
            self._keep_prefilled(session, output)
            return True
        if session.continued_as:
            if output.request_id != session.continued_as:
                return True
            self.seam.continue_output(output, session.request_id)
            if output.finish_reason is not None:
                self._forget(session)
            return True
        session.tokens += output.new_token_ids
        if output.finish_reason is None:
            return True
        limit = self.seam.is_length(output) and len(session.tokens) < session.max_tokens
        room = self.seam.max_model_len - session.request.num_prompt_tokens
        if not limit or len(session.tokens) >= room:
            # Finished by itself: a stop token, an error, or the client's own limit.
            if not session.ended:
                self._cancel(session, "finished at the first token")
            self._forget(session)
            return True
        output.finish_reason = None
        session.started = True
        session.first_token_at = session.progress_at = time.monotonic()
        # Sent from here, so that it is in the queue before the receiver can answer.
        self.seam.emit(client, [output])
        if session.ended:
            self._continue_locally(session)
        else:
            self._send(m.Start(session.session, session.tokens[-1]))
        return False

    def _keep_prefilled(self, session: Session, output: EngineCoreOutput) -> None:
        if output.finish_reason is None:
            return
        self._by_request.pop(session.request_id, None)
        if not session.handed_on and not session.ended:
            self._cancel(session, "the prefill failed")
        if output.kv_transfer_params and output.new_logprobs is not None:
            # The router throws the first token's own response away.
            ids, values, ranks, *_ = output.new_logprobs
            output.kv_transfer_params[ROUTER_KEY]["logprobs"] = {
                "token_ids": [int(token) for token in ids[0]],
                "values": [max(float(value), _LOWEST_LOGPROB) for value in values[0]],
                "rank": int(ranks[0]),
            }

    def _finish_parked(self, session: Session) -> None:
        """All KV is there: neither the workers nor this side have a part in it any more."""
        session.ended = True
        self._sessions.pop(session.session, None)
        self._tell_workers(session)

    def _hidden(self, request_id: str) -> bool:
        session = self._by_request.get(request_id)
        return session is not None and request_id != session.continued_as

    def _reported(self, request_id: str) -> str:
        session = self._by_request.get(request_id)
        return session.request_id if session is not None else request_id

    def _give_up(self, session: Session, cause: str, breaker: bool = True) -> None:
        """The receiver's part ends here; the response goes on locally."""
        if session.ended:
            return
        self._counts.fallbacks[cause] += 1
        if breaker:
            self._note_failure()
        self._cancel(session, cause)
        if session.started:
            self._continue_locally(session)
        else:
            session.request.max_tokens = session.max_tokens

    def _continue_locally(self, session: Session) -> None:
        assert self.seam is not None
        session.continued_as, session.queued = f"{session.request_id}-local", True
        self._by_request[session.continued_as] = session
        self.seam.resume(session.request, session.continued_as, session.tokens, session.max_tokens)

    def _cancel(self, session: Session, reason: str) -> None:
        session.ended = True
        self._sessions.pop(session.session, None)
        if session.asked:
            self._tell_workers(session)
            self._send(m.Cancel(session.session, reason))

    def _abort(self, session: Session) -> None:
        if not session.ended:
            self._counts.events["aborted"] += 1
            self._cancel(session, "the request was aborted")
        self._forget(session)

    def _tell_workers(self, session: Session) -> None:
        """The session is over. They hear of it in the engine's next step, as the metrics do, and an
        idle engine makes none by itself."""
        self._ended.append(session.session)
        if self.seam is not None:
            self.seam.wake()

    def _forget(self, session: Session) -> None:
        session.ended = True
        self._sessions.pop(session.session, None)
        self._by_request.pop(session.request_id, None)
        if session.continued_as:
            self._by_request.pop(session.continued_as, None)

    def _send(self, message: m.ClientMessage) -> None:
        if self.link is not None:
            self.link.send(message)

    # --- availability -----------------------------------------------------------------------

    def _unavailable(self) -> str | None:
        if not self._settings.enabled:
            return "disabled"
        if self.seam is None or self.link is None or self.link.target is None:
            return "no_receiver"
        if self._breaker.is_open(time.monotonic()):
            return "circuit_open"
        if self.seam.weights_changed:
            return "weights_changed"
        return None

    def _note_failure(self) -> None:
        pause = self._breaker.failed(time.monotonic())
        if pause:
            logger.warning("hand-offs keep failing; decoding locally for %.0f s", pause)

    # --- the link's thread (LinkListener) ---------------------------------------------------

    def connected(self, welcome: m.Welcome) -> None:
        """Nothing to do: sessions open as requests come."""

    def disconnected(self, reason: str) -> None:
        """Every session that the receiver had is lost."""
        with self._lock:
            if self._sessions:
                self._note_failure()
            for session in list(self._sessions.values()):
                self._give_up(session, "lost", breaker=False)

    def message(self, message: m.ReceiverMessage, arrived: float) -> None:
        """Act on what the receiver says."""
        with self._lock:
            match message:
                case m.Step():
                    self._decoded(message.decoded)
                    self._counts.relay_times.append(time.perf_counter() - arrived)
                case m.Refused() | m.Failed():
                    session = self._sessions.get(message.session)
                    if session is not None:
                        logger.debug("session of %s: %s", session.request_id, message.reason)
                        refused = isinstance(message, m.Refused)
                        self._give_up(
                            session,
                            ("refused_" if refused else "failed_") + message.code,
                            breaker=not refused,
                        )
                case m.Complete():
                    session = self._sessions.get(message.session)
                    if session is not None:
                        session.kv_complete = True
                        session.progress_at = time.monotonic()
                        self._counts.events["kv_bytes"] += message.kv_bytes
                        if session.handed_on:
                            self._finish_parked(session)
                case m.Status():
                    for progress in message.sessions:
                        self._progress(progress)
                case _:
                    pass

    def tick(self, now: float) -> None:
        """Give up sessions that have made no progress for too long."""
        with self._lock:
            for session in list(self._sessions.values()):
                if session.started and now - session.progress_at > self._settings.stall_timeout:
                    self._give_up(session, "stalled")

    def _progress(self, progress: m.Progress) -> None:
        session = self._sessions.get(progress.session)
        if session is not None:
            now = (progress.state, progress.kv_bytes, progress.tokens)
            if now != session.progress:
                session.progress = now
                session.progress_at = time.monotonic()

    def _decoded(self, step: list[m.Decoded]) -> None:
        now = time.monotonic()
        produced: list[tuple[Request, m.Decoded]] = []
        for decoded in step:
            session = self._sessions.get(decoded.session)
            if session is None or not session.started:
                continue
            if decoded.position != len(session.tokens):
                self._give_up(session, "failed_protocol")
                continue
            if len(session.tokens) == 1:
                self._counts.handoff_gaps.append(now - session.first_token_at)
            session.progress_at = now
            session.tokens += decoded.token_ids
            self._counts.events["tokens"] += len(decoded.token_ids)
            produced.append((session.request, decoded))
            if decoded.finish:
                self._counts.events["completed"] += 1
                self._breaker.succeeded()
                self._tell_workers(session)
                self._forget(session)
        if produced:
            assert self.seam is not None
            self.seam.emit_decoded(produced)

    # --- reporting --------------------------------------------------------------------------

    def take_counts(self) -> Counts:
        """What happened since the last call."""
        with self._lock:
            counts, self._counts = self._counts, Counts()
        return counts
