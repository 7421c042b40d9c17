"""One hand-off: its phases, what is known of it, and what is counted."""

from __future__ import annotations

import enum
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from mlx_receiver.planning.cost import Strategy
from mlx_receiver.wire.messages import Decoded
from mlx_receiver.wire.quantised import RAW
from mlx_receiver.wire.sampling import Sampling
from vllm_mac_decode.scheduler.promise import Promise

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from vllm_mac_decode.scheduler.homes import Home
    from vllm_mac_decode.scheduler.planner import Plan
    from vllm_mac_decode.scheduler.remote import Remote

#: Times of each kind that wait for vLLM to collect them.
KEPT_TIMES = 1024


class Phase(enum.Enum):
    """Where a hand-off is, as vLLM's side sees it."""

    #: It will be handed off; nobody was told yet, and vLLM ends it after one token.
    DECIDED = enum.auto()
    #: Open was sent, and vLLM prefills.
    OPEN = enum.auto()
    #: The first token is out, vLLM's own request has ended, and the receiver owes the rest; or the
    #: receiver owes all of it, and vLLM never had the request.
    DECODING = enum.auto()
    #: A router asks the receiver for the rest, or nobody does; only KV is left to be sent.
    PREFILLED = enum.auto()
    #: The receiver has no part in it any more; vLLM's own request goes on.
    LOCAL = enum.auto()
    #: Its continuation is on its way to vLLM's scheduler.
    CONTINUING = enum.auto()
    #: vLLM's scheduler has the continuation.
    CONTINUED = enum.auto()
    OVER = enum.auto()


#: What may follow what.
NEXT: Final = {
    Phase.DECIDED: {Phase.OPEN, Phase.LOCAL, Phase.OVER},
    Phase.OPEN: {Phase.DECODING, Phase.PREFILLED, Phase.LOCAL, Phase.OVER},
    Phase.DECODING: {Phase.CONTINUING, Phase.OVER},
    Phase.PREFILLED: {Phase.OVER},
    # Given up in the same step in which vLLM ended it after its one token.
    Phase.LOCAL: {Phase.CONTINUING, Phase.OVER},
    Phase.CONTINUING: {Phase.CONTINUED, Phase.OVER},
    Phase.CONTINUED: {Phase.OVER},
    Phase.OVER: set[Phase](),
}

#: The receiver knows about it, and will do something for it.
_REMOTE: Final = {Phase.OPEN, Phase.DECODING, Phase.PREFILLED}


@dataclass
class Handoff:
    """One handed-off request. ``tokens`` are its output so far, whoever produced them."""

    session: int
    request: Request
    max_tokens: int  # the client's
    sampling: Sampling  # as the receiver is told
    routed: bool = False  # a router's prefill: the receiver is asked for the rest over HTTP
    proof: bool = False  # nobody's: the receiver compares its cache with its own
    strategy: Strategy = Strategy.SPLIT
    phase: Phase = Phase.DECIDED
    receiver: Remote | None = None  # whom Open was sent to
    codec: str = RAW  # how its KV travels
    ratio: float = 1.0  # bytes that travel for each raw one
    #: The local continuation's request id; its own where vLLM begins what the receiver had.
    continued_as: str = ""
    #: Its client left while the continuation was on its way.
    given_up: bool = False
    promise: Promise | None = None  # what the receiver owes, once Open was sent
    tokens: list[int] = field(default_factory=list)
    first_token_at: float = 0.0
    plan: Plan | None = None
    home: Home | None = None  # what the receiver will have of the text
    #: Where the receiver does it all: when the request came, and when it had its turn there.
    arrived_at: float = 0.0
    begun_at: float = 0.0
    #: What came before vLLM has compiled the grammar that it must conform to.
    early: list[Decoded] = field(default_factory=list)

    @property
    def request_id(self) -> str:
        """The id under which the client's side knows it."""
        return self.request.request_id

    @property
    def whole(self) -> bool:
        """Whether the receiver does all of it, and vLLM's scheduler never had it."""
        return self.strategy is Strategy.MAC

    @property
    def cached(self) -> int:
        """Where the receiver computes the prompt: how many of its tokens it held already."""
        assert self.promise is not None
        return len(self.request.prompt_token_ids or ()) - self.promise.computed

    @property
    def remote(self) -> bool:
        """Whether the receiver has a part in it now."""
        return self.phase in _REMOTE

    @property
    def pending(self) -> bool:
        """Whether the receiver has a part in it now, or will have."""
        return self.remote or self.phase is Phase.DECIDED

    def enter(self, phase: Phase) -> None:
        """Every change of the phase passes here."""
        if phase not in NEXT[self.phase]:
            raise AssertionError(f"a hand-off cannot go from {self.phase.name} to {phase.name}")
        self.phase = phase


@dataclass
class Counts:
    """What happened since the last ``Relay.take_counts``.

    Of the times, in seconds, the latest are kept: nobody takes counts while vLLM's engine rests.
    """

    events: Counter[str] = field(default_factory=Counter)
    local: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)  # shadows, see ``shadow``
    plans: Counter[str] = field(default_factory=Counter)  # "strategy:reason"
    handoff_gaps: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT_TIMES))
    relay_times: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT_TIMES))
    #: Seconds that requests took, over those that were predicted.
    plan_errors: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT_TIMES))
