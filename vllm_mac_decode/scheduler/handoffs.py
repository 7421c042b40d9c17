"""The sessions of one engine, and how each of them can end.

Both halves of the relay work on them: ``Relay``, which vLLM calls, and ``Answers``, which the link
calls. Every method here wants the lock to be held.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Final

from mlx_receiver.wire import messages as m
from mlx_receiver.wire.layout import CacheLayout
from vllm_mac_decode.scheduler.handoff import Counts, Handoff, Phase
from vllm_mac_decode.scheduler.observing import Observing
from vllm_mac_decode.scheduler.planning import Planning
from vllm_mac_decode.scheduler.profiling import Profiling
from vllm_mac_decode.scheduler.remote import Remote
from vllm_mac_decode.scheduler.shadow import Shadow
from vllm_mac_decode.scheduler.thinking import left_over
from vllm_mac_decode.settings import Settings

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from vllm_mac_decode.scheduler.port import EnginePort

logger = logging.getLogger("vllm.mac_decode.relay")


#: Causes that leave open whether blocks get through.
_NO_BLOCKS: Final = ("unreachable", "stalled", "failed_block")


#: Texts that a receiver may have to do more than another before it loses a conversation to it.
_PATIENCE: Final = 4


class Handoffs:
    """Which receivers there are is part of what the lock guards: a session is opened while its own
    is connected and given up when that one is lost, never in between."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.RLock()
        self._sessions: dict[int, Handoff] = {}
        self._by_request: dict[str, Handoff] = {}
        self._ended: list[int] = []
        self._uncounted = False  # a response runs, and no step has told vLLM's metrics
        self._counts = Counts()
        self._receivers: list[Remote] = []
        self._closed = False  # no receiver is taken any more
        self._shadow = Shadow(settings.shadow_prefill, settings.shadow_chunk)
        #: How fast vLLM is; ``Remote.speed`` says it of a receiver.
        self.profiling = Profiling(settings.profile)
        self._observing = Observing(self.profiling.estimate)
        self._planning = Planning(settings, self.profiling.estimate)
        self.engine: EnginePort | None = None
        #: Of the model's cache; known when the engine is attached.
        self.layout: CacheLayout | None = None
        self.vocab_size = 0

    def _chosen(self, request: Request) -> Remote | str:
        """The receiver for a request: the one that may hold what its prompt begins with, unless it
        has much more to do than another; else the one with the least to do. Or why there is none,
        as a metric label."""
        if not self._settings.enabled:
            return "disabled"
        connected = [remote for remote in self._receivers if remote.welcome is not None]
        if self.engine is None or not connected:
            return "no_receiver"
        if self.engine.weights_changed:
            return "weights_changed"
        reasons = [remote.local_reason(request.num_prompt_tokens) for remote in connected]
        free = [remote for remote, no in zip(connected, reasons, strict=True) if not no]
        if not free:
            return reasons[0]
        ours = Counter(session.receiver for session in self._sessions.values())
        load = {remote: remote.others + ours[remote] for remote in free}
        least = min(free, key=load.__getitem__)
        home = self._planning.homes.of(request) if len(free) > 1 else None
        return home if home in load and load[home] <= load[least] + _PATIENCE else least

    def _finish_unclaimed(self, session: Handoff) -> None:
        """All KV is there: neither the workers nor this side have a part in it any more."""
        session.enter(Phase.OVER)
        self._sessions.pop(session.session, None)
        self._tell_workers(session)

    def _fall_back(self, session: Handoff, cause: str, breaker: bool = True) -> None:
        """The receiver's part ends here; the response goes on locally."""
        if not session.pending:
            return
        if cause in _NO_BLOCKS and session.receiver is not None and not session.whole:
            session.receiver.doubt()
        if session.proof:
            self._not_compared(session, cause)
            return
        self._counts.fallbacks[cause] += 1
        if cause == "queued":
            self._planning.waited(session.plan, time.monotonic())
        if breaker and session.receiver is not None:
            session.receiver.failed()
        self._part(session, cause)
        match session.phase:
            case Phase.DECODING:
                self._continue_locally(session)
            case Phase.PREFILLED:
                session.enter(Phase.OVER)
            case _:
                self._give_back(session)

    def _not_compared(self, session: Handoff, cause: str) -> None:
        """A proof came to nothing; it is tried again."""
        where = session.receiver.link.where if session.receiver and session.receiver.link else ""
        logger.warning(
            "the cache could not be compared with that of the receiver at %s (%s); it will be "
            "tried again, and until then responses are local",
            where,
            cause,
        )
        self._part(session, cause)
        if session.phase is Phase.PREFILLED:
            self._forget(session)
        else:
            session.enter(Phase.LOCAL)  # vLLM still has the request

    def _give_back(self, session: Handoff) -> None:
        """Nothing has come of it yet: vLLM goes on as without this connector."""
        session.enter(Phase.LOCAL)
        session.request.max_tokens = session.max_tokens

    def _continue_locally(self, session: Handoff) -> None:
        assert self.engine is not None
        request, name = session.request, f"{session.request_id}-local"
        self._shadow.drop(session.session)
        try:
            if session.tokens:
                self._end_reasoning(session, self.engine)
                goes_on = self.engine.resume(request, name, session.tokens, session.max_tokens)
            else:  # vLLM's scheduler never had it
                name, goes_on = session.request_id, True
                self.engine.requeue(request)
        except Exception:
            logger.exception("request %s cannot go on locally", session.request_id)
            self.engine.emit_aborted(request)
            goes_on = False
        if goes_on:
            session.enter(Phase.CONTINUING)
            session.continued_as = name
            self._by_request[name] = session
        else:
            self._forget(session)

    def _end_reasoning(self, session: Handoff, engine: EnginePort) -> None:
        """Say what is left of the end that a spent budget forces: vLLM would begin it anew."""
        request, position = session.request, len(session.tokens)
        rest = left_over(session.sampling, request.prompt_token_ids or [], session.tokens)
        if (grammar := session.sampling.grammar) is not None:
            rest = rest[: engine.accept(request, rest, grammar.after)]
        if rest:
            engine.emit_decoded([(request, m.Decoded(session.session, position, rest))])
            session.tokens += rest

    def _part(self, session: Handoff, reason: str) -> None:
        """Tell the receiver and the workers that it is nothing of theirs any more."""
        self._sessions.pop(session.session, None)
        self._unplan(session)
        if session.remote:
            self._tell_workers(session)
            if session.receiver is not None:
                session.receiver.send(m.Cancel(session.session, reason))

    def _abort(self, session: Handoff) -> None:
        if session.pending:
            self._counts.events["aborted"] += not session.proof
            self._planning.given_up(session.plan, len(session.tokens))
            self._part(session, "the request was aborted")
        self._forget(session)

    def _tell_gone(self, session: Handoff) -> None:
        """Its client has left, and vLLM's scheduler will not say that it has ended: by that vLLM's
        clients count what each of several engines has to do."""
        if self.engine is not None:
            self.engine.emit_aborted(session.request)

    def _tell_workers(self, session: Handoff) -> None:
        """The session is over. They hear of it in the engine's next step, as the metrics do, and an
        idle engine makes none by itself."""
        self._ended.append(session.session)
        if self.engine is not None:
            self.engine.wake()

    def _note(self, error: float | None) -> None:
        """How far a plan was from what came, if it predicted anything."""
        if error is not None:
            self._counts.plan_errors.append(error)

    def _unplan(self, session: Handoff) -> None:
        """Nothing more can be learnt from it."""
        if session.receiver is not None:
            session.receiver.throughput.ended(session.session)
        if session.home is not None:
            there = session.promise is not None and session.promise.complete
            session.home.tokens = session.request.num_prompt_tokens + len(session.tokens)
            session.home.tokens *= there
            session.home = None

    def _forget(self, session: Handoff) -> None:
        if session.phase is not Phase.OVER:
            session.enter(Phase.OVER)
        self._sessions.pop(session.session, None)
        self._unplan(session)
        self._shadow.ended(session.session, self.engine)
        self._by_request.pop(session.request_id, None)
        if session.continued_as:
            self._by_request.pop(session.continued_as, None)

    def _send(self, session: Handoff, message: m.Open | m.Start) -> None:
        """What cannot be said ends the hand-off: nobody will answer it."""
        if session.receiver is None or not session.receiver.send(message):
            self._fall_back(session, "lost", breaker=False)
