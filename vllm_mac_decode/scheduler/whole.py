"""Requests that a receiver does all of: vLLM's scheduler never has them.

The relay gives them away before vLLM's scheduler is given them. As long as nothing has come of one,
falling back means that vLLM gets it as it came; afterwards it is continued as any other.
"""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING, Final

from mlx_receiver.planning.cost import Strategy
from mlx_receiver.wire import messages as m
from vllm_mac_decode.scheduler.handoff import Handoff, Phase
from vllm_mac_decode.scheduler.handoffs import Handoffs
from vllm_mac_decode.scheduler.promise import Promise
from vllm_mac_decode.scheduler.remote import Remote

if TYPE_CHECKING:
    from vllm.v1.request import Request

#: Decode steps that wait for a grammar that vLLM compiles.
_MOST_EARLY: Final = 256


class Whole(Handoffs):
    """What there is to do for them. Every method wants the lock to be held."""

    def _decoded(self, remote: Remote, step: list[m.Decoded]) -> None:
        raise NotImplementedError

    def _came_back(self, session: Handoff) -> bool:
        """The continuation of a response is about to enter vLLM's scheduler, unless nobody waits
        for it any more: True then."""
        if session.phase is not Phase.CONTINUING:
            return False
        if session.given_up:
            self._tell_gone(session)
        if session.given_up or session.continued_as == session.request_id:
            self._forget(session)  # what vLLM has not begun yet is all its own
            return session.given_up
        session.enter(Phase.CONTINUED)
        return False

    def _give_away(self, session: Handoff, remote: Remote) -> bool:
        """Let the receiver do all of the request; False when it cannot be told."""
        request, layout = session.request, self.layout
        assert remote.welcome is not None and layout is not None
        promise = Promise(
            session.sampling,
            request.num_prompt_tokens,
            layout,
            remote.welcome.max_tokens,
            "all",
        )
        if not remote.send(opening(session, "all")):
            return False
        session.strategy, session.receiver, session.promise = Strategy.MAC, remote, promise
        session.enter(Phase.OPEN)
        session.enter(Phase.DECODING)
        session.arrived_at = session.begun_at = time.monotonic()
        promise.start(session.arrived_at)
        session.home = self._planning.homes.sent(request, remote)
        self._uncounted = True
        return True

    def _begin_text(self, session: Handoff, decoded: m.Decoded) -> None:
        """With its first token the request is counted as one that vLLM prefilled."""
        if session.tokens or not decoded.token_ids:
            return
        assert self.engine is not None
        self.engine.prefilled_elsewhere(
            session.request, session.cached, session.arrived_at, session.begun_at
        )

    def _too_early(self, session: Handoff, decoded: m.Decoded) -> bool:
        """Whether what came of a text with a grammar has to wait for vLLM's own, by which it is
        checked: vLLM waits for that, too."""
        if not session.whole:
            return False
        self._catch_up(session)
        assert self.engine is not None
        if not session.remote or self.engine.grammar_ready(session.request):
            return not session.remote
        session.early.append(decoded)
        if len(session.early) > _MOST_EARLY:
            self._fall_back(session, "grammar", breaker=False)
        return True

    def _catch_up(self, session: Handoff) -> None:
        """Send what waited for the grammar."""
        if not session.early or self.engine is None or session.receiver is None:
            return
        if session.remote and self.engine.grammar_ready(session.request):
            early, session.early = session.early, []
            for decoded in early:
                self._decoded(session.receiver, [decoded])


def opening(session: Handoff, compute: m.Compute = "nothing") -> m.Open:
    """What asks the receiver for the session."""
    request = session.request
    assert request.prompt_token_ids is not None
    return m.Open(
        session=session.session,
        request_id=m.clipped(request.request_id, 1024),
        prompt_token_ids=request.prompt_token_ids,
        sampling=session.sampling,
        codec=session.codec,
        unclaimed=session.routed,
        proof=session.proof,
        salt=_salt(request),
        compute=compute,
        plan=session.plan.decision.text if session.plan is not None else "",
    )


def _salt(request: Request) -> str:
    """Which texts the request's may share KV with, as in vLLM's own prefix cache."""
    salt = request.cache_salt
    return hashlib.sha256(salt.encode()).hexdigest() if salt else ""
