"""Requests that are planned, in the relay: what is told the planner, and what comes of it."""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from typing import Any

import pytest

from mlx_receiver.planning.cost import Strategy
from mlx_receiver.wire import messages as m
from tests.vllm_mac_decode.auto import MAC, VLLM, Auto
from tests.vllm_mac_decode.engine import PROMPT, Engine, Link
from tests.vllm_mac_decode.plain import Output
from tests.vllm_mac_decode.scheduler import test_handoff_phases
from tests.vllm_mac_decode.scheduler.test_structured_output import Structured
from vllm_mac_decode.scheduler.choices import Choices
from vllm_mac_decode.scheduler.planner import Plan
from vllm_mac_decode.scheduler.planning import Case
from vllm_mac_decode.scheduler.port import EngineLoad


def test_with_nothing_known_requests_are_handed_off() -> None:
    engine = Auto(known=False)
    assert engine.choose() == "split:unknown"
    assert engine.schedule() and not engine.port.resumed


def test_a_receivers_profile_may_come_later() -> None:
    engine = Auto(known=False)
    engine.relay.profiling.estimate.measured(VLLM)
    engine.slow()
    assert engine.choose("a") == "split:unknown"
    engine.say(m.Status(0, 0, True, 0, [], profile=MAC))
    assert engine.choose("b", max_tokens=4) == "vllm:fastest"


@pytest.mark.parametrize("offload", ["always", "never"])
def test_settings_are_followed_whatever_is_known(offload: str) -> None:
    engine = Auto(offload)
    engine.slow()
    expected = {"always": "split:setting", "never": "vllm:setting"}[offload]
    assert engine.choose() == expected
    assert (engine.schedule() > 0) == (offload == "always")
    assert not engine.relay._planning.watching


def test_always_asks_the_engine_nothing() -> None:
    """It is as without plans."""
    engine = Engine()
    engine.port.load = None  # type: ignore[assignment,method-assign]
    engine.port.prefixes.find = None  # type: ignore[assignment,union-attr,method-assign]
    assert engine.started(block_hashes=["x"])
    assert not engine.relay._planning.watching


def test_a_local_request_is_vllms_alone() -> None:
    engine = Auto()
    engine.slow()
    request = engine.add(max_tokens=4)
    assert request.max_tokens == 4 and not engine.schedule() and not engine.link.said
    counts = engine.counts()
    assert counts.plans == {"vllm:fastest": 1} and counts.local == {"planned": 1}
    for token in (1, 2, 3):
        engine.step(token=token, finished=False)
    engine.put_out(Output("a", [4], "length"))
    (error,) = engine.counts().plan_errors
    assert error < 0.5, "it was much faster than predicted"
    assert not engine.relay._planning.watching


def test_the_plan_goes_with_the_session() -> None:
    engine = Auto()
    assert engine.choose(max_tokens=8) == "split:fastest"
    engine.schedule()
    (opened,) = [message for message in engine.link.said if isinstance(message, m.Open)]
    assert opened.plan.startswith("split (fastest: vllm ")


def test_a_response_that_the_receiver_finishes_tells_how_good_its_plan_was() -> None:
    engine = Auto()
    number = engine.started(max_tokens=3)
    engine.decode(number, 1, 10)
    assert not engine.counts().plan_errors
    engine.decode(number, 2, 11, finish="length")
    assert len(engine.counts().plan_errors) == 1
    number = engine.started("b", max_tokens=3)
    engine.say(m.Failed(number, "internal", "x"))
    assert not engine.counts().plan_errors, "it went on in another way"


@pytest.mark.parametrize("changes", [True, False])
def test_what_a_link_has_become_is_no_fault_of_the_strategy(changes: bool) -> None:
    engine = Auto()
    number = engine.started(max_tokens=3)
    session = engine.relay._sessions[number]
    assert session.plan is not None
    session.plan.at -= 100.0
    if changes:
        engine.slow()
    engine.decode(number, 1, 10)
    engine.decode(number, 2, 11, finish="length")
    (error,) = engine.counts().plan_errors
    factor = engine.receiver.corrections.factor(Strategy.SPLIT, time.monotonic())
    assert error > 10 and (factor == 1.0) == changes


def test_the_threshold_counts_new_tokens() -> None:
    engine = Auto("always", offload_threshold=5)
    assert engine.choose("a") == "vllm:threshold"
    prompt = list(range(1, 21))
    hashes = [(None, tuple(prompt[:end])) for end in (4, 8, 12, 16, 20)]
    assert engine.choose("b", prompt=prompt, block_hashes=hashes) == "split:setting"
    assert engine.port.prefixes is not None
    engine.port.prefixes.compute(prompt[:16])
    assert engine.choose("c", prompt=prompt, block_hashes=hashes) == "vllm:threshold"
    assert engine.relay._counts.local == {} and not engine.schedule("c")


def test_a_broken_prefix_cache_is_done_without(caplog: pytest.LogCaptureFixture) -> None:
    engine = Auto()

    def find(request: object) -> tuple[int, float]:
        raise AttributeError("another vLLM")

    engine.port.prefixes.find = find  # type: ignore[union-attr,method-assign,assignment]
    caplog.set_level(logging.ERROR)
    for name in "ab":
        assert engine.choose(name, block_hashes=["x"]).startswith("split")
    assert len(caplog.records) == 1


def test_without_plans_requests_are_handed_off(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever is wrong with what they are made of."""
    engine = Auto()
    engine.port.load = None  # type: ignore[assignment,method-assign]
    caplog.set_level(logging.ERROR)
    for name in "ab":
        assert engine.choose(name) == "split:unknown"
        assert engine.schedule(name)
    assert len(caplog.records) == 1 and not engine.relay._planning.watching


def test_what_vllm_has_to_do_first_counts() -> None:
    """Of a long queue the first ones are looked at."""
    engine = Auto()
    engine.port.queued = EngineLoad(2, (("x", 1000), ("y", 500)))
    plan = _planned(engine)
    assert plan.decision.prediction is not None
    assert plan.decision.prediction.first_token == pytest.approx(1.503)
    engine.port.queued = EngineLoad(400, (("x", 1000), ("y", 500)))
    plan = _planned(engine)
    assert plan.decision.prediction is not None
    assert plan.decision.prediction.first_token == pytest.approx(300.003)


def _planned(engine: Engine) -> Plan:
    request = engine.add(f"r{len(engine.requests)}")
    engine.relay.abort([request.request_id])
    assert engine.relay.engine is not None and engine.relay.layout is not None
    return engine.relay._planning.decide(
        Case(
            request,  # type: ignore[arg-type]
            engine.receiver,
            {Strategy.VLLM, Strategy.SPLIT},
            engine.relay.engine,
            engine.relay.layout,
            [],
            1.0,
        )
    )


@pytest.mark.parametrize("planned", [True, False])
def test_prompts_that_the_receiver_computes_count_until_they_are(planned: bool) -> None:
    engine = Auto(offload="mac")
    engine.add("a")
    (session,) = engine.relay._sessions.values()
    if not planned:
        session.plan = None
    port, layout = engine.relay.engine, engine.relay.layout
    assert port is not None and layout is not None
    request, begun = session.request, session.begun_at
    case = Case(request, engine.receiver, set(), port, layout, [session], begun + 1.0)
    pair = engine.relay._planning._pair(case)
    assert pair is not None
    load = engine.relay._planning._load(case, pair)
    assert load.mac_seconds == pytest.approx(MAC.prefill.seconds(len(PROMPT)) - 1.0)
    assert load.mac_rows == 1 and load.link_bytes == 0
    session.tokens = [5]
    assert engine.relay._planning._load(case, pair).mac_seconds == 0


def test_what_the_receiver_holds_is_learnt() -> None:
    engine = Auto()
    number = engine.started("a", max_tokens=3, block_hashes=["a"])
    engine.decode(number, 1, 10)
    engine.decode(number, 2, 11, finish="length")
    longer = [*PROMPT, 7, 10, 11, 20, 21, 22]
    planning = engine.relay._planning
    request = engine.add("b", prompt=longer, block_hashes=["a", "b"])
    assert planning.homes.held(request, engine.receiver) == 6  # type: ignore[arg-type]
    number = engine.schedule("b")
    engine.say(m.Opened(number))
    assert engine.receiver.keeps == pytest.approx(0.75, abs=0.001), "it had nothing"
    for turn in range(20):
        number = engine.schedule(
            engine.add(f"t{turn}", prompt=longer, block_hashes=["a"]).request_id
        )
        engine.say(m.Opened(number))
        engine.relay.abort([f"t{turn}"])
    engine.lose()
    engine.connect()
    assert engine.receiver.keeps == 1.0, "another receiver is another one"


@pytest.mark.parametrize("restarts", [True, False])
def test_nothing_is_expected_of_a_receiver_that_has_restarted(restarts: bool) -> None:
    """It would be given a long conversation to prefill all alone."""
    engine = Auto()
    number = engine.started("a", max_tokens=3, block_hashes=["a"])
    engine.decode(number, 1, 10)
    engine.decode(number, 2, 11, finish="length")
    engine.lose()
    engine.connect(name="another" if restarts else "r")
    request = engine.add("b", prompt=[*PROMPT, 7, 10, 11, 20], block_hashes=["a", "b"])
    homes = engine.relay._planning.homes
    assert homes.of(request) is engine.receiver, "it may have it on its disk"  # type: ignore[arg-type]
    held = homes.held(request, engine.receiver)  # type: ignore[arg-type]
    assert held == (0 if restarts else 6)
    engine.schedule("b")
    assert homes.held(request, engine.receiver) == 7  # type: ignore[arg-type]


def test_what_is_held_where_the_receiver_does_all_is_told_once() -> None:
    engine = Auto(offload="mac")
    planning = engine.relay._planning
    planning._estimates = True
    engine.add("a", block_hashes=["a"])
    engine.relay.abort(["a"])
    planning.homes._ends["a"].tokens = 2
    engine.add("b", block_hashes=["a"])
    (session,) = engine.relay._sessions.values()
    assert session.whole and session.plan is not None and session.plan.expected == 2
    engine.say(m.Opened(session.session))
    engine.say(m.Complete(session.session, 0, computed=1))
    assert engine.receiver.keeps == 1.0, "it had all of it"


def test_another_receiver_is_not_expected_to_hold_it() -> None:
    engine = Auto()
    engine.started("a", max_tokens=3, block_hashes=["a"])
    engine.relay.abort(["a"])
    engine.add("b", prompt=[*PROMPT, 4, 5, 6], block_hashes=["a", "b"])
    other = engine.join(Link())
    engine.connect(remote=other, name="other")
    engine.lose()
    number = engine.schedule("b")
    engine.say(m.Opened(number), by=other)
    assert engine.relay._sessions[number].receiver is other
    assert other.keeps == 1.0


def test_a_transfer_that_never_ended_left_nothing_there() -> None:
    engine = Auto()
    engine.add("a", block_hashes=["a"])
    number = engine.schedule("a")
    engine.say(m.Opened(number))
    engine.relay.abort(["a"])
    request = engine.add("b", block_hashes=["a"])
    assert engine.relay._planning.homes.held(request, engine.receiver) == 0  # type: ignore[arg-type]


def test_steps_tell_how_fast_the_receiver_is(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Auto()
    number = engine.started(max_tokens=50)
    clock = [1000.0]
    monkeypatch.setattr("vllm_mac_decode.scheduler.answers.time.monotonic", lambda: clock[0])
    for position in range(1, 45):
        clock[0] += 0.04
        engine.decode(number, position, 10)
    speed = engine.receiver.speed.profile
    assert speed is not None and speed.source == "live"
    assert speed.decode.step == pytest.approx(0.04, rel=0.02)


def test_steps_beside_a_prompt_that_the_receiver_computes_do_not_tell_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Auto(offload="mac")
    clock = [1000.0]
    monkeypatch.setattr("vllm_mac_decode.scheduler.answers.time.monotonic", lambda: clock[0])
    engine.add(max_tokens=50)
    (number,) = engine.relay._sessions
    engine.say(m.Opened(number), m.Complete(number, 0, computed=len(PROMPT)))
    engine.add("b")
    for position in range(40):
        clock[0] += 0.5  # a chunk of the other's prompt is in each
        engine.decode(number, position, 10)
    assert engine.receiver.speed.profile == MAC


def test_what_waited_for_a_grammar_does_not_tell_how_fast_the_receiver_is() -> None:
    engine = Auto(offload="mac")
    engine.port.compiled = False
    engine.add(max_tokens=70, prompt=[1], structured_outputs=Structured(choice=["x"]))
    (number,) = engine.relay._sessions
    engine.say(m.Opened(number), m.Complete(number, 0, computed=1))
    for position in range(40):
        engine.decode(number, position, 11)
    seen = []
    engine.receiver.pace.step = lambda *told: seen.append(told)  # type: ignore[method-assign]
    engine.port.compiled = True
    engine.relay.tick(time.monotonic())
    assert len(engine.tokens()) == 40 and not seen


def test_the_link_is_measured_again_where_it_keeps_requests_local() -> None:
    engine = Auto()
    engine.slow()
    for name in "abc":
        engine.choose(name, max_tokens=4)
    now = engine.receiver.throughput._known_at + 1e6
    engine.relay.look(engine.receiver, now)
    assert engine.link.measured == 1
    engine.link.path = m.DataPath("h", 10**9, 1_000_000)
    engine.relay.look(engine.receiver, now)
    assert engine.receiver.throughput.link.rate == 10**9
    assert engine.choose("d", max_tokens=4) == "split:fastest", "at once: the difference is clear"


def test_a_slow_link_that_cannot_be_measured_is_tried_again() -> None:
    """As of the transports that are not tcp: only transfers tell how fast they are."""
    engine = Auto()
    engine.link.measurable = False
    engine.slow()
    now = engine.receiver.throughput._known_at
    assert engine.choose("b", max_tokens=4) == "vllm:fastest"
    engine.relay.look(engine.receiver, now + 200)
    assert engine.choose("c", max_tokens=4) == "vllm:fastest"
    engine.relay.look(engine.receiver, now + 400)
    assert engine.choose("d", max_tokens=4).startswith("split")


def test_nothing_is_kept_of_requests_that_are_gone() -> None:
    engine = Auto()
    engine.slow()
    planning = engine.relay._planning
    for name in "abc":
        engine.add(name, max_tokens=4)
    assert set(planning._local) == {"a", "b", "c"}
    for name in "ab":
        assert engine.relay.abort([name]) == [name]
        engine.relay.aborted(name)
    engine.relay.preempted("c")
    assert not planning.watching
    for number in range(5000):
        engine.add(f"r{number}", max_tokens=4)
    assert len(planning._local) <= 4096 and len(planning._waiting) <= 4096


def test_in_any_order_of_events_nothing_is_kept_of_what_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever is chosen for each request."""
    source = random.Random(1)
    chosen: Counter[str] = Counter()

    def settle(self: object, kind: object, best: Strategy, totals: Any, *_: object) -> Strategy:
        picked: Strategy = source.choice(list(totals))
        chosen[picked] += 1
        return picked

    monkeypatch.setattr(Choices, "settle", settle)
    monkeypatch.setattr(test_handoff_phases, "Engine", lambda **_: Auto())
    for seed in range(300):
        drive = test_handoff_phases.Drive(seed)
        drive.run(80)
        planning, sessions = drive.relay._planning, drive.relay._sessions
        for receiver in drive.receivers:
            assert receiver.throughput._open.keys() <= sessions.keys(), seed
        assert not drive.gone & planning._local.keys(), seed
        assert not drive.gone & planning._waiting.keys(), seed
    assert min(chosen[strategy] for strategy in Strategy) > 100
