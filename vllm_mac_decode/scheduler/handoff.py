"""What the relay knows of a handed-off request, and what it counts."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mlx_receiver.wire.messages import Sampling
from vllm_mac_decode.scheduler.promise import Promise

if TYPE_CHECKING:
    from vllm.v1.request import Request

#: Times of each kind that wait for vLLM to collect them.
KEPT_TIMES = 1024


@dataclass
class Session:
    """One handed-off request. ``tokens`` are its output so far, whoever produced them."""

    session: int
    request: Request
    max_tokens: int  # the client's
    sampling: Sampling  # as the receiver is told
    asked: bool = False  # Open was sent
    started: bool = False  # the first token is out, the local request has ended
    ended: bool = False  # the receiver has no part in it any more
    continued_as: str = ""  # the local continuation's request id
    queued: bool = False  # the continuation is on its way to vLLM's scheduler
    promise: Promise | None = None  # what the receiver owes, once Open was sent
    parked: bool = False  # a router's prefill: the receiver is asked for the rest over HTTP
    handed_on: bool = False  # the router knows about it; only KV is left to be sent
    tokens: list[int] = field(default_factory=list)
    first_token_at: float = 0.0

    @property
    def request_id(self) -> str:
        """The id under which the client's side knows it."""
        return self.request.request_id


@dataclass
class Counts:
    """What happened since the last ``Relay.take_counts``.

    Of the times, in seconds, the latest are kept: nobody takes counts while vLLM's engine rests.
    """

    events: Counter[str] = field(default_factory=Counter)
    local: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    handoff_gaps: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT_TIMES))
    relay_times: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT_TIMES))
