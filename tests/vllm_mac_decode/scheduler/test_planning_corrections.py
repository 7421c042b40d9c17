"""What becomes of plans that turn out wrong, and of profiles that say nothing."""

from __future__ import annotations

import math
import time

import msgspec
import pytest

from mlx_receiver.planning.cost import Strategy
from mlx_receiver.wire import messages as m
from mlx_receiver.wire.profile import Decode, Prefill, Profile
from tests.vllm_mac_decode.auto import MAC, Auto
from tests.vllm_mac_decode.engine import BYTES, PROMPT
from tests.vllm_mac_decode.plain import Output


def test_texts_that_end_by_a_stop_string_are_counted() -> None:
    """vLLM's engine sees them given up."""
    engine = Auto()
    outputs = engine.relay._planning._outputs
    number = engine.started("a", max_tokens=50, stop=["x"])
    for position in range(1, 5):
        engine.decode(number, position, 10)
    engine.relay.abort(["a"])
    assert outputs.expected(1000) == 5
    engine.slow()
    engine.add("b", max_tokens=4, stop=["x"])
    engine.step("b", finished=False)
    engine.step("b", finished=False)
    assert engine.relay.abort(["b"]) == ["b"]
    engine.relay.aborted("b")
    assert outputs.expected(1000) == round((5 + 2) / 2)
    engine.add("c", max_tokens=4)
    engine.step("c", finished=False)
    engine.relay.aborted("c")
    assert outputs.expected(1000) == round((5 + 2) / 2), "its client left"


@pytest.mark.parametrize("zero", [Prefill(0.0, 0.0, 0.0, 1), Decode(0.0, 0.0, 0.0)])
def test_a_profile_in_which_nothing_takes_time_is_none(zero: Prefill | Decode) -> None:
    engine = Auto()
    name = "prefill" if isinstance(zero, Prefill) else "decode"
    engine.say(m.Status(0, 0, True, 0, [], profile=msgspec.structs.replace(MAC, **{name: zero})))
    assert engine.receiver.speed.profile is None
    assert engine.choose() == "split:unknown"


def test_a_receiver_that_kept_nothing_for_a_while_is_expected_to_keep_texts_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What stays in vLLM for that is told nothing by it."""
    engine = Auto()
    for _ in range(20):
        engine.receiver.held(0, 1000)
    assert engine.receiver.keeps < 0.05
    later = time.monotonic() + 1800
    monkeypatch.setattr("vllm_mac_decode.scheduler.remote.time.monotonic", lambda: later)
    assert engine.receiver.keeps > 0.99


@pytest.mark.parametrize("seconds", [5e-324, 1e-320])
def test_a_receiver_that_claims_to_take_no_time_leaves_the_metrics_finite(seconds: float) -> None:
    engine = Auto()
    none = Profile("r", "m", Prefill(0.0, seconds, 0.0, 2048), Decode(seconds, 0.0, 0.0))
    vllm = msgspec.structs.replace(none, device="v")
    engine.relay.profiling.estimate.measured(vllm)
    engine.say(m.Status(0, 0, True, 0, [], profile=none))
    engine.add(max_tokens=4)
    for token in (1, 2, 3):
        engine.step(token=token, finished=False)
    engine.put_out(Output("a", [4], "length"))
    assert all(math.isfinite(error) for error in engine.counts().plan_errors)


@pytest.mark.parametrize("seconds", [100.0, 0.0])
def test_responses_that_the_receiver_keeps_waiting_are_predicted_to_take_longer(
    seconds: float,
) -> None:
    """Nothing else tells of its queue: they end elsewhere."""
    engine = Auto(queue_timeout=1.0)
    for name in "abc":
        number = engine.started(name, max_tokens=4)
        session = engine.relay._sessions[number]
        assert session.plan is not None
        assert session.plan.decision.strategy is Strategy.SPLIT, "no other one is better"
        session.plan.at -= seconds
        queued = m.Progress(number, "queued", len(PROMPT) * BYTES, 0)
        engine.say(m.Status(0, 0, True, 0, [queued]))
        engine.relay.tick(time.monotonic() + 1.1)
    assert engine.counts().fallbacks == {"queued": 3} and len(engine.port.resumed) == 3
    for strategy in (Strategy.SPLIT, Strategy.MEET, Strategy.MAC):
        factor = engine.receiver.corrections.factor(strategy, time.monotonic())
        assert factor > 1.4 if seconds else factor == 1.0


def test_what_requests_taught_goes_with_the_receiver() -> None:
    engine = Auto()
    before = engine.receiver.corrections
    before.observe(Strategy.SPLIT, 1.4, 0.0)
    engine.lose()
    engine.connect()
    assert engine.receiver.corrections is not before
    assert engine.receiver.corrections.factor(Strategy.SPLIT, 0.0) == 1.0


def test_a_receiver_that_seemed_slow_is_tried_again() -> None:
    """It gets nothing that could tell otherwise."""
    engine = Auto()
    assert engine.choose("a") == "split:fastest"
    now = time.monotonic()
    for step in range(40):
        engine.receiver.speed.observe_decode(10, 1, 50 * MAC.decode.step, now - 40 + step)
    assert engine.choose("b") == "vllm:fastest"
    for estimate in (engine.receiver.speed, engine.relay.profiling.estimate):
        for factor in (estimate._prefill, estimate._decode):
            factor._at = now - 3000 if factor._at is not None else None
    assert engine.choose("c").startswith("split")
