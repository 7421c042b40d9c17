"""One receiver, as the relay sees it: whether it takes requests, and what its link tells."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final, Protocol

from mlx_receiver.wire import messages as m
from vllm_mac_decode.scheduler.breaker import CircuitBreaker

if TYPE_CHECKING:
    from vllm_mac_decode.scheduler.link import Link

logger = logging.getLogger("vllm.mac_decode.relay")

#: Seconds between two attempts to compare its cache: the first ones, and the most.
_PROOF_SECONDS: Final = (5.0, 60.0)


class User(Protocol):
    """Who hears what a receiver says; for any thread."""

    def taken(self, receiver: str, remote: Remote) -> bool:
        """Whether another remote is that receiver."""

    def connected(self, remote: Remote, welcome: m.Welcome) -> bool:
        """See ``LinkListener.connected``."""

    def disconnected(self, remote: Remote) -> None:
        """Every session of it is lost."""

    def message(self, remote: Remote, message: m.ReceiverMessage, arrived: float) -> None:
        """See ``LinkListener.message``."""

    def idle(self, remote: Remote) -> bool:
        """Whether no hand-off to it is under way."""

    def tick(self, now: float) -> None:
        """See ``LinkListener.tick``."""

    def leave(self, remote: Remote) -> None:
        """It is gone for good."""


class Remote:
    """The ``LinkListener`` of one link. What is not a listener's method wants the relay's lock."""

    def __init__(self, user: User) -> None:
        self._user = user
        self._breaker = CircuitBreaker()
        self.link: Link | None = None
        #: The connected receiver's; None while there is none.
        self.welcome: m.Welcome | None = None
        #: What its last Status said; ``others``: sessions of other vLLMs there.
        self.accepting = True
        self.others = 0
        #: Whether its model is known to compute the same cache.
        self.proven = False
        self._proof_pause, self._proof_due = _PROOF_SECONDS[0], 0.0

    def enter(self, welcome: m.Welcome | None) -> None:
        """Another conversation has begun, or (None) the last one has ended."""
        self.welcome, self.accepting, self.others = welcome, True, 0
        # The pause goes on growing with a receiver that comes and goes.
        self.proven = welcome is not None and not welcome.proof_token_ids

    def prove(self) -> None:
        """Its cache is the same."""
        self.proven = True
        self._proof_pause, self._proof_due = _PROOF_SECONDS[0], 0.0

    def owes_proof(self, now: float) -> bool:
        """Whether its cache is to be compared now."""
        return self.welcome is not None and not self.proven and now >= self._proof_due

    def compares(self, now: float) -> None:
        """An attempt begins; the next one, if it comes to nothing, not soon."""
        self._proof_due = now + self._proof_pause
        self._proof_pause = min(2 * self._proof_pause, _PROOF_SECONDS[1])

    def heard(self, status: m.Status) -> None:
        """What the receiver says of itself."""
        self.accepting = status.accepting
        self.others = max(0, status.load - len(status.sessions))

    def local_reason(self, prompt_tokens: int) -> str:
        """Why a request with this prompt cannot be handed off to it now, as a metric label; "" if
        it can."""
        if self.welcome is None:
            return "no_receiver"
        if not self.proven:
            return "unproven"
        if self._breaker.is_open(time.monotonic()):
            return "circuit_open"
        if not self.accepting:
            return "receiver_full"
        # Of a prompt that leaves room for one token only, that token is vLLM's own.
        if prompt_tokens + 1 >= self.welcome.max_tokens:
            return "receiver_context"
        return ""

    def send(self, message: m.ClientMessage) -> bool:
        """False when it cannot be said."""
        return self.link is not None and self.link.send(message)

    def doubt(self) -> None:
        """Blocks did not arrive there."""
        if self.link is not None:
            self.link.doubt()

    def failed(self) -> None:
        """A hand-off failed by the receiver's fault."""
        pause = self._breaker.failed(time.monotonic())
        if pause:
            where = f" to {self.link.where}" if self.link is not None else ""
            logger.warning("hand-offs%s keep failing; none for %.0f s", where, pause)

    def succeeded(self) -> None:
        """A hand-off went well to its end."""
        self._breaker.succeeded()

    # --- the link's thread ------------------------------------------------------------------

    def taken(self, receiver: str) -> bool:
        """See ``LinkListener.taken``."""
        return self._user.taken(receiver, self)

    def connected(self, welcome: m.Welcome) -> bool:
        """See ``LinkListener.connected``."""
        return self._user.connected(self, welcome)

    def disconnected(self, reason: str) -> None:
        """See ``LinkListener.disconnected``."""
        self._user.disconnected(self)

    def message(self, message: m.ReceiverMessage, arrived: float) -> None:
        """See ``LinkListener.message``."""
        self._user.message(self, message, arrived)

    def idle(self) -> bool:
        """See ``LinkListener.idle``."""
        return self._user.idle(self)

    def tick(self, now: float) -> None:
        """See ``LinkListener.tick``."""
        self._user.tick(now)

    def leave(self) -> None:
        """See ``fleet.Member.leave``."""
        self._user.leave(self)
