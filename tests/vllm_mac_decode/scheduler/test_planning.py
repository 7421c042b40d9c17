"""Requests that are planned, in the relay: what is told the planner, and what comes of it."""

from __future__ import annotations

import logging
import math
import random
import time
from collections import Counter
from typing import Any

import msgspec
import pytest

from mlx_receiver.planning.cost import Strategy
from mlx_receiver.wire import messages as m
from mlx_receiver.wire.keys import new_ticket
from mlx_receiver.wire.layout import full_attention
from mlx_receiver.wire.profile import Coding, Decode, Prefill, Profile
from tests.vllm_mac_decode.engine import BYTES, CONTEXT, PROMPT, Engine, Link
from tests.vllm_mac_decode.plain import Output
from tests.vllm_mac_decode.scheduler import test_handoff_phases
from tests.vllm_mac_decode.scheduler.test_structured_output import Structured
from vllm_mac_decode.scheduler.choices import Choices
from vllm_mac_decode.scheduler.planner import Plan
from vllm_mac_decode.scheduler.planning import Case
from vllm_mac_decode.scheduler.port import EngineLoad

#: One that prefills fast and decodes slowly, and the other way round.
VLLM = Profile("v", "m", Prefill(0.0, 1e-3, 0.0, 8192), Decode(0.1, 0.0, 0.0))
MAC = Profile("r", "m", Prefill(0.0, 1.0, 0.0, 2048), Decode(0.02, 0.0, 0.0))


class Auto(Engine):
    """With profiles of both sides."""

    def __init__(self, offload: str = "auto", known: bool = True, **settings: Any) -> None:
        super().__init__(offload=offload, **settings)
        self.lose()
        if known:
            self.relay.profiling.estimate.measured(VLLM)
        welcome = m.Welcome("r", "m", "e", [], new_ticket(), CONTEXT, ["raw"], profile=MAC)
        self.link.up = True
        assert self.receiver.connected(welcome if known else _without(welcome))

    def choose(self, name: str = "a", **params: Any) -> str:
        """What is done with a request, and why."""
        self.add(name, **params)
        (found,) = self.counts().plans
        return str(found)

    def slow(self, rate: float = 100.0) -> None:
        self.link.path = m.DataPath("h", int(rate), 1_000_000)
        self.relay.look(self.receiver, 0.0)


def _without(welcome: m.Welcome) -> m.Welcome:
    return msgspec.structs.replace(welcome, profile=None)


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


def test_what_is_quantised_is_planned_with_and_told_of_in_the_bytes_that_travel() -> None:
    engine = Auto(codec="q8")
    engine.relay.layout = full_attention(1, 1, 64, "float32")
    welcome = engine.receiver.welcome
    assert welcome is not None
    engine.receiver.welcome = msgspec.structs.replace(welcome, codecs=["raw", "q8"])
    engine.choose(max_tokens=8)
    engine.schedule()
    (session,) = engine.relay._sessions.values()
    assert session.plan is not None and session.codec == "q8"
    decision = session.plan.decision
    predicted = {prediction.strategy: prediction for prediction in decision.predictions}
    split, meet = predicted[Strategy.SPLIT], predicted[Strategy.MEET]
    assert (split.codec.name, meet.codec.name) == ("q8", "raw")
    assert split.kv_bytes == len(PROMPT) * 2 * (64 + 8)
    assert session.ratio == split.codec.ratio == (64 + 8) / 256
    assert session.promise is not None
    port = engine.relay.engine
    assert port is not None
    case = Case(session.request, engine.receiver, set(), port, engine.relay.layout, [session], 0.0)
    pair = engine.relay._planning._pair(case)
    assert pair is not None
    load = engine.relay._planning._load(case, pair)
    assert load.link_bytes == session.promise.missing * session.ratio > 0


# --- codec=auto ---------------------------------------------------------------------------------


def quantising(offload: str = "always", **settings: Any) -> Auto:
    """Of a cache that can be quantised, with a receiver that knows how."""
    engine = Auto(offload, **{"codec": "auto", **settings})
    engine.relay.layout = full_attention(1, 1, 64, "float32")
    welcome = engine.receiver.welcome
    assert welcome is not None
    engine.receiver.welcome = msgspec.structs.replace(welcome, codecs=["raw", "q8", "q4"])
    return engine


def sent(engine: Auto, name: str = "a", **params: Any) -> m.Open:
    """How a request is handed off."""
    engine.add(name, **params)
    assert engine.schedule(name)
    opened = engine.link.said[-1]
    assert isinstance(opened, m.Open)
    return opened


def test_an_automatic_codec_follows_the_link_whatever_decides_who_does_what() -> None:
    engine = quantising()
    opened = sent(engine)
    assert (opened.codec, opened.plan) == ("raw", "split (setting)"), "a fast one"
    engine.slow()
    opened = sent(engine, "b")
    assert (opened.codec, opened.plan) == ("q8", "split q8 (setting)")
    session = engine.relay._sessions[opened.session]
    assert session.codec == "q8" and session.ratio == (64 + 8) / 256
    engine.link.path = m.DataPath("h", 10**9, 1_000_000)
    engine.relay.look(engine.receiver, 0.0)
    assert sent(engine, "c").codec == "raw"
    engine.slow(500.0)
    planned = quantising("auto")
    planned.slow(1500.0)
    assert sent(planned, max_tokens=60, prompt=list(range(1, 7))).plan.startswith("split q8 (fast")


def stating(vllm: Coding, mac: Coding, link: float, **settings: Any) -> str:
    """The codec of a prompt with much KV, with sides that say so of their speed."""
    engine = quantising(**settings)
    # 210 MB for a token, which vLLM computes in no time.
    engine.relay.layout = full_attention(100, 4096, 64, "float32")
    fast = Prefill(0.0, 1e-6, 0.0, 8192)
    engine.relay.profiling.estimate.measured(
        msgspec.structs.replace(VLLM, prefill=fast, coding=vllm)
    )
    engine.say(m.Status(0, 0, True, 0, [], profile=msgspec.structs.replace(MAC, coding=mac)))
    engine.slow(link)
    return sent(engine, max_tokens=2).codec


@pytest.mark.parametrize("link", [0.3e9, 1e9, 3e9])
def test_it_is_chosen_by_what_both_sides_say_of_their_speed(link: float) -> None:
    slow, fast = Coding(q8=0.5 * link), Coding(q8=3 * link)
    assert stating(fast, fast, link) == "q8"
    assert stating(slow, fast, link) == stating(fast, slow, link) == "raw"
    # What an old one does not say is taken to be as on a core of a server.
    assert stating(Coding(), Coding(), link) == ("q8" if link < 0.6e9 else "raw")


def test_workers_and_connections_count() -> None:
    each = Coding(q8=0.5e9, threads=8)
    one = Coding(q8=0.5e9)
    assert stating(one, each, 1e9) == "raw"
    assert stating(Coding(q8=0.5e9, threads=4), each, 1e9) == "q8"
    assert stating(Coding(q8=2e9), each, 1e9) == "raw"
    assert stating(Coding(q8=2e9), each, 1e9, streams=4) == "q8"
    assert stating(Coding(q8=2e9), one, 1e9, streams=4) == "raw", "it has one core"


@pytest.mark.parametrize("rate", [5e-324, 1e-9, 1.0, 1e18])
def test_absurd_rates_only_make_a_codec_look_good_or_bad(rate: float) -> None:
    absurd = Coding(q8=rate, q4=rate, threads=65536)
    wanted = "q8" if rate > 1e9 else "raw"
    assert stating(Coding(q8=1e10), absurd, 1e9) == wanted
    assert stating(Coding(q8=0.1e9), absurd, 1e9) == "raw", "no more than this side does"


def test_a_routers_prefill_has_an_automatic_codec_too() -> None:
    engine = quantising("auto")
    engine.slow()
    transfer = {"do_remote_decode": True, "do_remote_prefill": False}
    opened = sent(engine, max_tokens=1, kv_transfer_params=transfer)
    assert opened.unclaimed and opened.codec == "q8"


def test_a_receiver_that_does_not_quantise_gets_raw_kv_though_another_was_planned_with() -> None:
    engine = quantising()
    engine.slow()
    engine.add("a")
    other = engine.join(Link())
    engine.connect(remote=other, name="other")
    engine.lose()
    number = engine.schedule("a")
    assert engine.relay._sessions[number].receiver is other
    assert engine.relay._sessions[number].codec == "raw"


def test_a_conversation_that_travelled_quantised_is_no_beginning_for_a_raw_one() -> None:
    engine = quantising()
    engine.slow()
    number = sent(engine, block_hashes=["a"]).session
    engine.relay.abort(["a"])
    homes = engine.relay._planning.homes
    homes._ends["a"].tokens = 3
    request = engine.add("b", prompt=[*PROMPT, 4, 5], block_hashes=["a", "b"])
    assert homes.find(request, engine.receiver) == (3, "q8")  # type: ignore[arg-type]
    engine.link.path = m.DataPath("h", 10**9, 1_000_000)
    engine.relay.look(engine.receiver, 0.0)
    engine.relay.abort(["b"])
    opened = sent(engine, "c", prompt=[*PROMPT, 4, 5], block_hashes=["a", "b"])
    engine.say(m.Opened(opened.session))
    assert opened.codec == "raw" and number != opened.session
    assert engine.receiver.keeps == 1.0, "nothing was expected there"


# --- lengths, and what is told of nothing -------------------------------------------------------


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
