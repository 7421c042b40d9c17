"""What is fuzzed: for each target how its inputs are drawn, and what must hold for them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from mlx_receiver.http.openai.claims import HandOff
from mlx_receiver.wire import frames
from mlx_receiver.wire import messages as m
from tests.fuzz import decoders, http_bodies, receiving


@dataclass(frozen=True)
class Target:
    """``check`` looks at one drawn input and returns how many cases it made of it.

    ``share`` is the target's part of a long run's cases, ``examples`` what a short run draws.
    """

    drawn: st.SearchStrategy[Any]
    check: Callable[[Any], int]
    share: int
    examples: int


TARGETS = {
    "client messages": Target(
        decoders.tagged(get_args(m.ClientMessage)), decoders.client_messages, 45, 25
    ),
    "receiver messages": Target(
        decoders.tagged(get_args(m.ReceiverMessage)), decoders.receiver_messages, 45, 25
    ),
    "data payloads": Target(
        decoders.tagged(
            (frames.DataHello, frames.DataChallenge, frames.DataProof, frames.DataReply)
        ),
        decoders.data_payloads,
        10,
        20,
    ),
    "headers": Target(decoders.header_fields, decoders.headers, 10, 60),
    "HTTP bodies": Target(decoders.tagged(http_bodies.BODIES), http_bodies.bodies, 20, 25),
    "hand-offs over HTTP": Target(decoders.tagged((HandOff,)), http_bodies.hand_offs, 5, 15),
    "receiver's sessions": Target(receiving.events, receiving.sessions, 1, 60),
}

if importlib.util.find_spec("vllm") is not None:
    from tests.fuzz import relaying

    TARGETS["relay's sessions"] = Target(st.integers(0, 2**32), relaying.orders, 5, 40)


def fuzz(name: str, examples: int, seed: int | None = None) -> int:
    """Draw inputs for a target and check them; how many cases that were.

    Raises what the check raises for the smallest input that was found.
    """
    target, cases = TARGETS[name], 0

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(target.drawn)
    def check(drawn: Any) -> None:
        nonlocal cases
        cases += target.check(drawn)

    _seeded(check, seed)()
    return cases


def _seeded(check: Callable[[], None], number: int | None) -> Callable[[], None]:
    return check if number is None else seed(number)(check)
