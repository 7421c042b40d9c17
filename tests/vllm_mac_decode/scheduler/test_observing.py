"""What requests tell of how fast vLLM is."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_receiver.planning.live import Estimate
from tests.vllm_mac_decode.engine import Engine
from tests.vllm_mac_decode.plain import Output, Outputs
from vllm_mac_decode.scheduler.observing import Observing


class Noted(Estimate):
    def __init__(self) -> None:
        super().__init__(None)
        self.seen: list[tuple[Any, ...]] = []

    def observe_prefill(self, new: int, context: int, seconds: float, now: Any = None) -> None:
        self.seen.append(("prefill", new, context, round(seconds, 6)))

    def observe_decode(self, context: int, rows: int, seconds: float, now: Any = None) -> None:
        self.seen.append(("decode", context, rows, round(seconds, 6)))


@pytest.fixture
def noted() -> Noted:
    return Noted()


@pytest.fixture
def observing(noted: Noted) -> Observing:
    return Observing(noted)


def test_a_request_that_is_alone(noted: Noted, observing: Observing) -> None:
    observing.added("a", 100)
    observing.scheduled("a", 30, 1.0)
    observing.stepped([("a", 1, False)], 1.5)
    observing.stepped([("a", 1, False)], 1.6)
    observing.stepped([("a", 1, True)], 1.7)
    assert noted.seen == [
        ("prefill", 70, 30, 0.5), ("decode", 101, 1, 0.1), ("decode", 102, 1, 0.1)
    ]  # fmt: skip
    assert not observing._running and not observing._coming


def test_a_prefill_beside_others_says_nothing(noted: Noted, observing: Observing) -> None:
    for name in "ab":
        observing.added(name, 100)
    observing.scheduled("a", 0, 1.0)
    observing.scheduled("b", 0, 1.1)
    observing.stepped([("a", 1, False)], 1.5)
    observing.stepped([("a", 1, False), ("b", 1, False)], 1.7)
    assert noted.seen == [], "one of them was still prefilled"
    observing.stepped([("a", 1, False), ("b", 1, False)], 1.9)
    assert noted.seen == [("decode", 101, 2, 0.2)]
    observing.scheduled("a shadow", 0, 2.0)
    observing.stepped([("a", 1, False), ("b", 1, False)], 2.5)
    assert len(noted.seen) == 1
    observing.gone("b")
    observing.stepped([("a", 1, False)], 2.6)
    observing.stepped([("a", 3, False)], 2.8)
    assert len(noted.seen) == 1, "one left, and then there were guesses that came true"


def test_a_preempted_request_is_one_of_those_that_are_decoded(noted: Noted) -> None:
    engine = Engine(offload="never")
    engine.relay._observing = observing = Observing(noted)
    for name in "ab":
        engine.add(name)
        engine.schedule(name)
    both = [Output("a", [1]), Output("b", [1])]
    engine.relay.rewrite({0: Outputs(both)})  # type: ignore[dict-item]
    engine.relay.preempted("b")
    for _ in range(3):  # b's tokens are computed again meanwhile
        engine.put_out(Output("a", [1]))
    assert not noted.seen
    for _ in range(2):
        engine.relay.rewrite({0: Outputs(both)})  # type: ignore[dict-item]
    assert [rows for _, _, rows, _ in noted.seen] == [2]
    engine.relay.aborted("b")
    assert "b" not in observing._running


def test_requests_that_never_end_take_no_memory(observing: Observing) -> None:
    for n in range(30_000):
        observing.added(f"a{n}", 1)
        if n % 2:
            observing.scheduled(f"a{n}", 0, float(n))
    assert len(observing._running) <= 8192 and len(observing._coming) <= 8192
