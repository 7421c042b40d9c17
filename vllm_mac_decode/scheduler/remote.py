"""One receiver, as the relay sees it: whether it takes requests, and what its link tells."""

from __future__ import annotations

import logging
import math
import time
from typing import TYPE_CHECKING, Final, Protocol

from mlx_receiver.planning.live import Estimate
from mlx_receiver.wire import messages as m
from vllm_mac_decode.scheduler.breaker import CircuitBreaker
from vllm_mac_decode.scheduler.pace import Pace
from vllm_mac_decode.scheduler.planner import Corrections
from vllm_mac_decode.scheduler.throughput import Throughput

if TYPE_CHECKING:
    from vllm_mac_decode.scheduler.link import Link

logger = logging.getLogger("vllm.mac_decode.relay")

#: Seconds between two attempts to compare its cache: the first ones, and the most.
_PROOF_SECONDS: Final = (5.0, 60.0)

#: What one answer counts for in the mean of how much of what is expected there is found, and the
#: seconds without one in which what is missing falls to a third: what is not sent there for that
#: cannot tell that it would be kept.
_ONE_ANSWER: Final = 0.25
_FORGET_SECONDS: Final = 300.0


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

    def look(self, remote: Remote, now: float) -> None:
        """As often, for the thread of its link: the way to it may have been measured."""

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
        #: Its process, as it named itself last.
        self.process = ""
        #: What its last Status said; ``others``: sessions of other vLLMs there.
        self.accepting = True
        self.others = 0
        #: Whether its model is known to compute the same cache.
        self.proven = False
        self._proof_pause, self._proof_due = _PROOF_SECONDS[0], 0.0
        #: How fast it computes, and how fast the way there is.
        self.speed = Estimate(None)
        self.throughput = Throughput()
        self.pace = Pace()
        #: How much longer requests took there than was predicted.
        self.corrections = Corrections()
        #: The share of earlier texts that it had not any more when they went on, and since when.
        self._lost, self._lost_at = 0.0, 0.0
        self._path: m.DataPath | None = None

    def enter(self, welcome: m.Welcome | None) -> None:
        """Another conversation has begun, or (None) the last one has ended."""
        self.welcome, self.accepting, self.others = welcome, True, 0
        # The pause goes on growing with a receiver that comes and goes.
        self.proven = welcome is not None and not welcome.proof_token_ids
        self.speed.measured(welcome.profile if welcome is not None else None)
        self.throughput, self.pace = Throughput(), Pace()
        self.corrections = Corrections()
        self._lost, self._path = 0.0, None
        self.look(time.monotonic())

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
        if status.profile is not None:
            self.speed.measured(status.profile)
        arrived = {progress.session: progress.kv_bytes for progress in status.sessions}
        self.throughput.told(1e-9 * status.clock_ns, arrived, time.monotonic())

    def held(self, tokens: int, expected: int) -> None:
        """It has so many tokens of a prompt of which it was expected to have others."""
        if expected > 0:
            keeps = self.keeps
            keeps += _ONE_ANSWER * (min(1.0, tokens / expected) - keeps)
            self._lost, self._lost_at = 1.0 - keeps, time.monotonic()

    @property
    def keeps(self) -> float:
        """The share of an earlier text that it still has when the text goes on."""
        passed = time.monotonic() - self._lost_at
        return 1.0 - self._lost * math.exp(-passed / _FORGET_SECONDS)

    def look(self, now: float) -> None:
        """See what its link has measured, and have it measure if that is needed."""
        if self.link is None:
            return
        path = self.link.path
        if path is not None and path is not self._path:
            self._path = path
            self.throughput.measured(path.rate, 1e-9 * path.round_trip_ns, now)
        if self.throughput.unsure(now) and not self.link.measure():
            self.throughput.forget(now)

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
        return self._user.taken(receiver, self)

    def connected(self, welcome: m.Welcome) -> bool:
        return self._user.connected(self, welcome)

    def disconnected(self, reason: str) -> None:
        self._user.disconnected(self)

    def message(self, message: m.ReceiverMessage, arrived: float) -> None:
        self._user.message(self, message, arrived)

    def idle(self) -> bool:
        return self._user.idle(self)

    def tick(self, now: float) -> None:
        self._user.tick(now)
        self._user.look(self, now)

    def leave(self) -> None:
        """See ``fleet.Member.leave``."""
        self._user.leave(self)
