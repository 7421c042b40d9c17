"""The relay in every order in which an engine, a receiver, clients and time can meet."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from mlx_receiver.wire import codec
from mlx_receiver.wire import messages as m
from tests.vllm_mac_decode.engine import BYTES, CONTEXT, PROMPT, Engine
from tests.vllm_mac_decode.plain import Output, Outputs, Params, Request, Stats


@pytest.fixture
def engine() -> Engine:
    return Engine()


def test_a_hand_off_from_beginning_to_end(engine: Engine) -> None:
    number = engine.started(max_tokens=4)
    engine.decode(number, 1, 10)
    engine.decode(number, 2, 11, 12, finish="length")
    assert engine.port.out == [("a", [7], ""), ("a", [10], ""), ("a", [11, 12], "length")]
    assert [type(message) for message in engine.link.said] == [m.Open, m.Start]
    assert not engine.relay.busy() and not engine.relay._by_request
    counts = engine.counts()
    assert (counts.events["completed"], counts.events["tokens"]) == (1, 3)
    assert not counts.fallbacks


def test_tokens_leave_before_anything_follows_from_them(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = [engine.started(name, max_tokens=3) for name in ("a", "b")]
    woken, when = engine.port.woken, []
    emit = engine.port.emit_decoded

    def emitted(decoded: Any) -> None:
        when.append((engine.port.woken, len(engine.relay._sessions)))
        emit(decoded)

    monkeypatch.setattr(engine.port, "emit_decoded", emitted)
    step = [m.Decoded(number, 1, [10, 11], "length") for number in numbers]
    engine.say(m.Step(step))
    assert when == [(woken, 2)]
    assert engine.port.woken > woken and not engine.relay._sessions
    counts = engine.counts()
    assert (counts.events["completed"], counts.events["tokens"]) == (2, 4)
    assert len(counts.relay_times) == 1


def test_what_comes_behind_the_end_is_nobodys(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    number = engine.started(max_tokens=2)
    engine.say(m.Step([m.Decoded(number, 1, [10], "length"), m.Decoded(number, 2, [11])]))
    engine.decode(number, 2, 11)
    assert engine.port.out == [("a", [7], ""), ("a", [10], "length")]
    assert engine.counts().events["completed"] == 1
    assert not engine.counts().fallbacks and not caplog.records


# --- a receiver that is lost ------------------------------------------------------------------


def test_lost_before_the_request_comes(engine: Engine) -> None:
    engine.lose()
    assert engine.add().max_tokens == 8
    assert engine.schedule() == 0
    assert engine.counts().local == {"no_receiver": 1}


@pytest.mark.parametrize("told", [True, False])
def test_lost_between_deciding_and_opening(engine: Engine, told: bool) -> None:
    """``told``: whether the link's thread has got round to saying so."""
    request = engine.add()
    assert request.max_tokens == 1
    engine.link.up = False
    if told:
        engine.receiver.disconnected("it is gone")
    assert engine.schedule() == 0
    assert request.max_tokens == 8, "it goes on as if nothing had been"
    assert engine.step(finished=False).outputs[0].new_token_ids == [7]
    engine.lose()
    counts = engine.counts()
    assert (counts.local, counts.fallbacks) == (
        ({"no_receiver": 1}, {}) if told else ({}, {"lost": 1})
    )
    assert not engine.relay._sessions and not engine.port.resumed


def test_lost_between_opening_and_the_first_token(engine: Engine) -> None:
    request = engine.add()
    engine.schedule()
    engine.lose()
    assert request.max_tokens == 8
    # The step that was under way ended it by the limit of one.
    assert engine.step(finished=True).outputs == []
    assert engine.port.resumed == [("a", "a-local", [7], 8)]


@pytest.mark.parametrize("told", [True, False])
def test_lost_just_before_start_is_said(engine: Engine, told: bool) -> None:
    engine.add()
    engine.schedule()
    engine.link.up = False
    engine.step()
    if told:
        engine.receiver.disconnected("it is gone")
    assert engine.port.resumed == [("a", "a-local", [7], 8)]
    assert engine.tokens() == [7]
    assert engine.counts().fallbacks == {"lost": 1}


def test_lost_while_it_decodes(engine: Engine) -> None:
    number = engine.started()
    engine.decode(number, 1, 10)
    engine.lose()
    engine.connect()
    engine.decode(number, 2, 11)  # nobody asked
    assert engine.port.resumed == [("a", "a-local", [7, 10], 8)]
    assert engine.tokens() == [7, 10]


def test_lost_at_any_moment_of_many_requests() -> None:
    """Two threads, as the engine's and the link's: no response is left to nobody."""
    engine = Engine()
    ends = threading.Event()

    def come_and_go() -> None:
        while not ends.is_set():
            engine.lose()
            engine.connect()

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for i in range(400):
            name = f"r{i}"
            request = engine.add(name)
            number = engine.schedule(name)
            if number and i % 2:
                engine.complete(number)
            engine.step(name)
            if request.max_tokens == 1 and number and i % 2:
                engine.decode(number, 1, 10)
    finally:
        ends.set()
        thread.join()
    engine.lose()
    assert not engine.relay._sessions
    resumed = {name for name, *_ in engine.port.resumed}
    alive = {name for name, request in engine.requests.items() if request.max_tokens == 8}
    assert resumed | alive == engine.requests.keys()


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> float:
    """A clock that stands, as the machine may have other work for longer than a test allows."""
    now = time.monotonic()
    monkeypatch.setattr("vllm_mac_decode.scheduler.relay.time.monotonic", lambda: now)
    return now


def test_the_clock_gives_up_what_waits(still: float, engine: Engine) -> None:
    engine.started()
    engine.relay.tick(still + 1.9)
    assert not engine.port.resumed
    engine.relay.tick(still + 2.1)
    assert engine.counts().fallbacks == {"stalled": 1}
    assert engine.link.doubts == 1, "another address of the receiver's may still work"


def test_queued_is_not_the_breakers_business(still: float) -> None:
    engine = Engine(queue_timeout=5)
    for i in range(8):
        number = engine.started(f"r{i}")
        engine.say(m.Status(0, 0, True, 0, [m.Progress(number, "queued", 3 * BYTES, 0)]))
    engine.relay.tick(still + 4.9)
    assert not engine.port.resumed
    engine.relay.tick(still + 5.1)
    assert engine.counts().fallbacks == {"queued": 8}
    assert engine.add("next").max_tokens == 1, "hand-offs go on"


def test_a_full_receiver_is_left_alone(engine: Engine) -> None:
    engine.say(m.Status(0, 0, False, 0, []))
    assert engine.add().max_tokens == 8
    engine.say(m.Status(0, 0, True, 0, []))
    assert engine.add("b").max_tokens == 1
    engine.say(m.Status(0, 0, False, 0, []))
    engine.connect()
    assert engine.add("c").max_tokens == 1
    assert engine.counts().local == {"receiver_full": 1}


# --- a receiver that breaks its promises ------------------------------------------------------

LIES: dict[str, list[m.Decoded]] = {
    "beyond the limit": [m.Decoded(0, 1, [10] * 20)],
    "another position": [m.Decoded(0, 3, [10])],
    "an early end": [m.Decoded(0, 1, [10], "stop")],
    "nothing": [m.Decoded(0, 1, [])],
    "two parts, the second right": [m.Decoded(0, 1, [10, 11, 12], "stop"), m.Decoded(0, 1, [9])],
}


@pytest.mark.parametrize("lie", LIES)
def test_nothing_of_a_lie_is_seen(engine: Engine, lie: str) -> None:
    number, beside = engine.started(), engine.started("b")
    engine.decode(number, 1, 9) if "right" in lie else None
    before = engine.tokens()
    others = [m.Decoded(number, d.position + len(before) - 1, d.token_ids, d.finish)
              for d in LIES[lie][:1]]  # fmt: skip
    engine.say(m.Step([*others, m.Decoded(beside, 1, [50])]))
    assert engine.tokens() == before
    assert engine.tokens("b") == [7, 50]
    assert engine.port.resumed == [("a", "a-local", before, 8)]
    assert isinstance(engine.link.said[-1], m.Cancel)
    assert engine.counts().fallbacks == {"failed_protocol": 1}


def test_of_two_parts_of_a_step_the_first_counts(engine: Engine) -> None:
    number = engine.started()
    engine.say(m.Step([m.Decoded(number, 1, [10]), m.Decoded(number, 2, [11])]))
    assert engine.tokens() == [7, 10]
    assert engine.port.resumed == [("a", "a-local", [7, 10], 8)]


def test_what_ends_a_response_does_not_overtake_its_tokens(engine: Engine) -> None:
    number = engine.started(max_tokens=2)
    # Nothing is left for a continuation to do, so it is told that it has ended.
    engine.port.broken = True
    engine.say(m.Step([m.Decoded(number, 1, [10], "length"), m.Decoded(number, 2, [11])]))
    assert engine.port.out == [("a", [7], ""), ("a", [10], "length")]


def test_a_continuation_that_cannot_be_made_is_aborted(engine: Engine) -> None:
    numbers = [engine.started(name) for name in "ab"]
    engine.port.broken = True
    engine.decode(numbers[0], 5, 10)
    assert engine.port.out[-1] == ("a", [], "abort")
    engine.lose()
    assert engine.port.out[-1] == ("b", [], "abort")
    assert not engine.relay._by_request


@pytest.mark.parametrize("message", [
    m.Opened(5), m.Complete(5, 0), m.Refused(5, "capacity", ""), m.Failed(5, "internal", ""),
    m.Step([m.Decoded(5, 1, [3])]), m.Status(0, 0, True, 0, [m.Progress(5, "ended", 0, 0)]),
])  # fmt: skip
def test_unknown_sessions_are_ignored(engine: Engine, message: m.ReceiverMessage) -> None:
    number = engine.started()
    engine.say(message)
    engine.decode(number, 1, 10)
    assert engine.tokens() == [7, 10]
    assert not engine.counts().fallbacks


def test_a_context_shorter_than_vllms(engine: Engine) -> None:
    assert engine.add("long", prompt=[1] * (CONTEXT - 1)).max_tokens == 8
    assert engine.counts().local == {"receiver_context": 1}
    engine.add(prompt=[1] * (CONTEXT - 2))
    number = engine.schedule()
    engine.complete(number, CONTEXT - 2)
    engine.step()
    engine.decode(number, 1, 10, finish="length")
    assert engine.port.out == [("a", [7], ""), ("a", [10], "")]
    assert engine.port.resumed == [("a", "a-local", [7, 10], 8)]
    assert engine.counts().fallbacks == {"context": 1}


# --- what the receiver must not be sent -------------------------------------------------------


@pytest.mark.parametrize("params", [
    {"stop_token_ids": [10**9]}, {"stop_token_ids": [-1]}, {"stop_token_ids": list(range(2000))},
    {"logit_bias": {99: float("inf")}}, {"logit_bias": dict.fromkeys(range(9000), 1.0)},
    {"presence_penalty": float("nan")},
])  # fmt: skip
def test_what_is_out_of_range_stays_local(engine: Engine, params: dict[str, Any]) -> None:
    engine.relay.vocab_size = 10_000
    assert engine.add(**params).max_tokens == 8
    assert engine.counts().local == {"out_of_range": 1}


def test_tokens_allowed_twice_are_said_once(engine: Engine) -> None:
    """The receiver hangs up on a list that is longer than its vocabulary."""
    engine.add(allowed_token_ids=[5, 6] * 1000)
    engine.schedule("a")
    assert engine.link.said[0].sampling.allowed_token_ids == [5, 6]


def test_a_clients_long_request_id_does_no_harm(engine: Engine) -> None:
    engine.add("x" * 5000)
    engine.schedule("x" * 5000)
    codec.decode_client(codec.encode(engine.link.said[0]))


# --- a router's prefills ----------------------------------------------------------------------


def test_kv_for_a_router_that_never_completes_is_given_up(engine: Engine) -> None:
    request = engine.add(max_tokens=1, kv_transfer_params={"do_remote_decode": True})
    engine.schedule()
    request.output_token_ids.append(7)
    engine.relay.prefilled(request)
    engine.put_out(Output("a", [7], "length"))
    assert engine.relay.busy(), "vLLM does not stop while it is sent"
    engine.relay.tick(time.monotonic() + 50)
    assert engine.relay.busy()
    engine.relay.tick(time.monotonic() + 61)
    assert not engine.relay.busy() and not engine.relay._sessions and not engine.port.resumed


# --- metrics ----------------------------------------------------------------------------------


def test_what_the_receiver_decodes_runs(engine: Engine) -> None:
    def running() -> int:
        outputs = Outputs(scheduler_stats=Stats(num_running_reqs=2))
        engine.relay.rewrite({0: outputs})
        assert outputs.scheduler_stats is not None
        return outputs.scheduler_stats.num_running_reqs

    engine.add()
    number = engine.schedule()
    assert running() == 2, "the scheduler's own"
    assert engine.step().scheduler_stats.num_running_reqs == 1
    engine.complete(number)
    assert running() == 3
    engine.lose()
    assert running() == 3, "its continuation is on its way"
    continuation = Request("a-local", PROMPT, Params(max_tokens=7))
    engine.relay.on_new_request(continuation)
    assert running() == 2


def test_the_end_of_a_continuation_is_counted_as_its_requests(engine: Engine) -> None:
    """By that clients of several engines know how much each of them has to do."""
    number = engine.started()
    engine.decode(number, 1, 10)
    engine.lose()
    engine.relay.on_new_request(Request("a-local", [*PROMPT, 7, 10], Params(6)))  # type: ignore[arg-type]
    outputs = Outputs([Output("a-local", [11], "stop")], Stats(), {"a-local"})
    engine.relay.rewrite({0: outputs})  # type: ignore[dict-item]
    assert outputs.finished_requests == {"a"}
