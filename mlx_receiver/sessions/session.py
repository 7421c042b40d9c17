"""One request on the receiver: where it is in its life, and what it has come to."""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from mlx_receiver.caches.memory import Reservation
from mlx_receiver.caches.model import CacheBuffers
from mlx_receiver.planning.cost import Strategy
from mlx_receiver.sessions.arrivals import Arrivals, Timeline
from mlx_receiver.sessions.earlier import NEW, Beginning
from mlx_receiver.wire.layout import CacheLayout
from mlx_receiver.wire.messages import E_SESSION, Open, WireError

if TYPE_CHECKING:
    from concurrent.futures import Future

    from mlx_receiver.decode.grammar.compiling import Compiled
    from mlx_receiver.decode.jobs import Job

#: What arrives for a prompt that the receiver computes itself.
NO_KV: Final = CacheLayout([])

#: Who does what, by what the receiver computes of the prompt.
_STRATEGIES: Final = {"nothing": Strategy.SPLIT, "front": Strategy.MEET, "all": Strategy.MAC}


class Owner(Protocol):
    """Whose session it is: who opened it, or has claimed it since."""

    id: str  # DataTicket.client of whoever opened it


class Phase(enum.StrEnum):
    """Where a session is in its life."""

    RECEIVING = "receiving"
    #: Everything is there; whoever opened the session is being told.
    COMPLETE = "complete"
    #: They know, and it waits for the first token.
    WAITING = "waiting"
    DECODING = "decoding"
    ENDED = "ended"


#: What may follow what.
_NEXT: Final = {
    Phase.RECEIVING: {Phase.COMPLETE, Phase.ENDED},
    Phase.COMPLETE: {Phase.WAITING, Phase.DECODING, Phase.ENDED},
    Phase.WAITING: {Phase.DECODING, Phase.ENDED},
    Phase.DECODING: {Phase.ENDED},
    Phase.ENDED: set(),
}


@dataclass(frozen=True, slots=True)
class Ended:
    """What is remembered of a session that has ended."""

    request_id: str
    strategy: Strategy
    phase: Phase
    tokens: int
    held_tokens: int
    kv_bytes: int
    output_tokens: int
    timeline: Timeline
    plan: str = ""


class Session(Arrivals):
    """One request: its phase, who hears of it, and (``Arrivals``) its cache as it arrives.

    Thread-safe.
    """

    def __init__(
        self,
        opened: Open,
        client: Owner,
        layout: CacheLayout,
        reservation: Reservation,
        beginning: Beginning = NEW,
        partition: str = "",
    ) -> None:
        """``reservation`` covers the cache in the client's ``layout`` and its marks
        (``Coverage``); the session lets go of it when it ends. ``beginning`` is what earlier
        texts of the same ``partition`` left of it."""
        tokens = len(opened.prompt_token_ids)
        super().__init__(opened.session, tokens, layout, opened.codec, reservation, beginning.held)
        self.request_id = opened.request_id
        self.prompt_token_ids = opened.prompt_token_ids
        self.sampling = opened.sampling
        self.client = client
        #: Whose blocks arrive; an unclaimed session that is claimed gets another ``client``.
        self.opener = client
        self.unclaimed = opened.unclaimed
        self.proof = opened.proof
        self.plan = opened.plan
        self.compute = opened.compute
        self.strategy = _STRATEGIES[opened.compute]
        self.partition = partition
        self.beginning = beginning
        self.phase = Phase.RECEIVING if self.strategy is not Strategy.MAC else Phase.DECODING
        self.first_token: int | None = None
        self.job: Job | None = None
        #: Of its grammar, if it has one.
        self.compiling: Future[Compiled] | None = None
        self.decoded = 0  # tokens, by this receiver
        self._told = False

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self.phase is not Phase.ENDED

    @property
    def computed(self) -> int:
        """Tokens of the prompt that the receiver has computed for its text."""
        return self.job.computed if self.job is not None and self.job.prefills else 0

    @property
    def begun(self) -> bool:
        """Whether something has been computed for it here."""
        return self.computed > 0 or self.decoded > 0

    @property
    def output_tokens(self) -> int:
        """Tokens of the text, with vLLM's own first one."""
        others = self.strategy is not Strategy.MAC
        return self.decoded + others if self.decoded else 0

    def give_memory(self, buffers: CacheBuffers) -> bool:
        """Take the session's memory, which may still grow. False when the session ended
        meanwhile."""
        with self._changed:
            if self.phase is Phase.ENDED:
                return False
            self._buffers = buffers
            self.timeline.allocated_ns = time.monotonic_ns()
            return True

    def told(self) -> None:
        """Whoever opened the session knows that it is open."""
        with self._changed:
            self._told = True

    def memory_grew(self) -> bool:
        """Another layer is allocated. False when the session ended meanwhile."""
        with self._changed:
            self._changed.notify_all()
            return self.phase is not Phase.ENDED

    def take_memory(self) -> CacheBuffers:
        """Hand the complete memory to the decoder. Raises WireError when the session has ended."""
        with self._changed:
            if self._buffers is None:
                raise WireError(E_SESSION, f"session {self.id} has ended")
            buffers, self._buffers = self._buffers, None
            return buffers

    def completed(self) -> bool:
        """Whether everything is there and nobody was told yet: True for one caller, who tells, and
        then calls ``announced``."""
        with self._changed:
            if self._coverage.absent or self.phase is not Phase.RECEIVING:
                return False
            if not self._told or self._buffers is None:
                return False
            if self._buffers.layers < len(self.layout.layers):
                return False  # nothing of its last layers had to come
            self._fill()
            self._enter(Phase.COMPLETE)
            return True

    def announced(self) -> bool:
        """Note that whoever opened the session knows that it is complete; whether it is to be
        decoded now."""
        with self._changed:
            if self.phase is not Phase.COMPLETE:
                return False
            ready = self.first_token is not None
            self._enter(Phase.DECODING if ready else Phase.WAITING)
            return ready

    def started(self, first_token: int) -> bool:
        """Note the first token; whether the session is to be decoded now."""
        with self._changed:
            if self.first_token is None:
                self.first_token = first_token
                self.timeline.started_ns = time.monotonic_ns()
                self.last_progress = time.monotonic()
            if self.phase is not Phase.WAITING:
                return False
            self._enter(Phase.DECODING)
            return True

    def _enter(self, phase: Phase) -> None:
        """With the lock. Every change of the phase passes here."""
        assert phase in _NEXT[self.phase], f"from {self.phase} to {phase}"
        self.phase = phase

    def end(self, outcome: str) -> bool:
        """Release the memory. False when the session had ended before."""
        with self._changed:
            if self.phase is Phase.ENDED:
                return False
            self._enter(Phase.ENDED)
            self.timeline.outcome = outcome
            self.timeline.ended_ns = time.monotonic_ns()
            self._buffers = None
            self._coverage.forget()
            self._changed.notify_all()
        self.reservation.release()
        return True

    def summary(self) -> Ended:
        """What is worth remembering."""
        return Ended(
            self.request_id,
            self.strategy,
            self.phase,
            self.tokens,
            self.held_tokens,
            self.kv_bytes,
            self.output_tokens,
            self.timeline,
            plan=self.plan,
        )
