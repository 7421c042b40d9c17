"""The sessions of one engine, and how each of them can end.

Both halves of the relay work on them: ``Relay``, which vLLM calls, and ``Answers``, which the link
calls. Every method here wants the lock to be held.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from typing import TYPE_CHECKING, Final

from mlx_receiver.wire import messages as m
from mlx_receiver.wire.layout import CacheLayout
from vllm_mac_decode.scheduler.handoff import Counts, Handoff, Phase
from vllm_mac_decode.scheduler.remote import Remote
from vllm_mac_decode.settings import Settings

if TYPE_CHECKING:
    from vllm_mac_decode.scheduler.port import EnginePort

logger = logging.getLogger("vllm.mac_decode.relay")


#: Causes that leave open whether blocks get through.
_NO_BLOCKS: Final = ("unreachable", "stalled", "failed_block")


class Handoffs:
    """Which receivers there are is part of what the lock guards: a session is opened while its own
    is connected and given up when that one is lost, never in between."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.RLock()
        self._sessions: dict[int, Handoff] = {}
        self._by_request: dict[str, Handoff] = {}
        self._ended: list[int] = []
        self._counts = Counts()
        self._receivers: list[Remote] = []
        self._closed = False  # no receiver is taken any more
        self.engine: EnginePort | None = None
        #: Of the model's cache; known when the engine is attached.
        self.layout: CacheLayout | None = None
        self.vocab_size = 0

    def _chosen(self, prompt_tokens: int) -> Remote | str:
        """The receiver with the least to do, for a request with this prompt; or why there is none,
        as a metric label."""
        if not self._settings.enabled:
            return "disabled"
        connected = [remote for remote in self._receivers if remote.welcome is not None]
        if self.engine is None or not connected:
            return "no_receiver"
        if self.engine.weights_changed:
            return "weights_changed"
        reasons = [remote.local_reason(prompt_tokens) for remote in connected]
        free = [remote for remote, no in zip(connected, reasons, strict=True) if not no]
        if not free:
            return reasons[0]
        ours = Counter(session.receiver for session in self._sessions.values())
        return min(free, key=lambda remote: remote.others + ours[remote])

    def _finish_unclaimed(self, session: Handoff) -> None:
        """All KV is there: neither the workers nor this side have a part in it any more."""
        session.enter(Phase.OVER)
        self._sessions.pop(session.session, None)
        self._tell_workers(session)

    def _fall_back(self, session: Handoff, cause: str, breaker: bool = True) -> None:
        """The receiver's part ends here; the response goes on locally."""
        if not session.pending:
            return
        if cause in _NO_BLOCKS and session.receiver is not None:
            session.receiver.doubt()
        if session.proof:
            self._not_compared(session, cause)
            return
        self._counts.fallbacks[cause] += 1
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
        try:
            goes_on = self.engine.resume(request, name, session.tokens, session.max_tokens)
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

    def _part(self, session: Handoff, reason: str) -> None:
        """Tell the receiver and the workers that it is nothing of theirs any more."""
        self._sessions.pop(session.session, None)
        if session.remote:
            self._tell_workers(session)
            if session.receiver is not None:
                session.receiver.send(m.Cancel(session.session, reason))

    def _abort(self, session: Handoff) -> None:
        if session.pending:
            self._counts.events["aborted"] += not session.proof
            self._part(session, "the request was aborted")
        self._forget(session)

    def _tell_workers(self, session: Handoff) -> None:
        """The session is over. They hear of it in the engine's next step, as the metrics do, and an
        idle engine makes none by itself."""
        self._ended.append(session.session)
        if self.engine is not None:
            self.engine.wake()

    def _forget(self, session: Handoff) -> None:
        if session.phase is not Phase.OVER:
            session.enter(Phase.OVER)
        self._sessions.pop(session.session, None)
        self._by_request.pop(session.request_id, None)
        if session.continued_as:
            self._by_request.pop(session.continued_as, None)

    def _send(self, session: Handoff, message: m.Open | m.Start) -> None:
        """What cannot be said ends the hand-off: nobody will answer it."""
        if session.receiver is None or not session.receiver.send(message):
            self._fall_back(session, "lost", breaker=False)
