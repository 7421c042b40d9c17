"""Comparing the two engines' caches before anything is handed off, in every order of events."""

from __future__ import annotations

import random
import time

import pytest

from mlx_receiver.wire import messages as m
from tests.vllm_mac_decode.engine import BYTES, Engine
from tests.vllm_mac_decode.plain import Output
from vllm_mac_decode.scheduler.link import Unusable

TOKENS = [5, 6, 7, 8]


def owing() -> Engine:
    """An idle engine whose receiver wants the caches compared."""
    engine = Engine()
    engine.lose()
    engine.connect(proof=TOKENS)
    engine.port.idle = True
    return engine


def tick(engine: Engine, seconds: float = 0.0) -> None:
    engine.relay.tick(time.monotonic() + seconds)


def begun(engine: Engine) -> tuple[str, int]:
    """The proof's request, as vLLM schedules it, and its session."""
    tick(engine)
    request = engine.port.prefilled[-1]
    engine.requests[request.request_id] = request
    engine.relay.on_new_request(request)  # type: ignore[arg-type]
    return request.request_id, engine.schedule(request.request_id)


def proven(engine: Engine) -> None:
    name, number = begun(engine)
    engine.complete(number, len(TOKENS))
    engine.step(name)
    engine.say(m.Proven(number, True, "0.1 % apart"))


def test_what_is_said_and_what_nobody_sees() -> None:
    engine = owing()
    name, number = begun(engine)
    opening = engine.link.said[-1]
    assert isinstance(opening, m.Open)
    assert opening.proof and not opening.unclaimed and opening.prompt_token_ids == TOKENS
    went = engine.step(name, token=9)
    assert went.outputs == [] and engine.port.out == []
    assert engine.link.said[-1] == m.Start(number, 9)
    engine.complete(number, len(TOKENS))
    assert not engine.receiver.proven, "the cache is there, but it was not compared"
    engine.say(m.Proven(number, True, "0.1 % apart"))
    assert engine.receiver.proven and not engine.relay._sessions and not engine.relay._by_request
    assert engine.relay.take_ended() == [number]
    assert engine.started()
    counts = engine.counts()
    assert not counts.fallbacks and counts.events["kv_bytes"] == (len(TOKENS) + 3) * BYTES


def test_requests_are_local_until_then() -> None:
    engine = owing()
    request = engine.add()
    assert request.max_tokens == 8 and engine.counts().local == {"unproven": 1}
    proven(engine)
    assert engine.add("b").max_tokens == 1


def test_it_waits_until_vllm_is_idle() -> None:
    engine = owing()
    engine.port.idle = False
    tick(engine)
    assert not engine.port.prefilled
    engine.port.idle = True
    tick(engine)
    tick(engine)
    assert len(engine.port.prefilled) == 1, "one at a time"


def test_it_may_be_turned_off() -> None:
    engine = Engine(proof=False)
    engine.lose()
    engine.connect(proof=TOKENS)
    engine.port.idle = True
    tick(engine)
    assert not engine.port.prefilled and engine.started()


def test_a_receiver_whose_cache_differs_is_not_used() -> None:
    engine = owing()
    name, number = begun(engine)
    engine.complete(number, len(TOKENS))
    engine.step(name)
    with pytest.raises(Unusable, match="layer 0, keys: 141 % apart"):
        engine.say(m.Proven(number, False, "layer 0, keys: 141 % apart"))
    assert not engine.receiver.proven and not engine.relay._by_request
    assert engine.add().max_tokens == 8


@pytest.mark.parametrize("when", ["decided", "open", "complete", "prefilled"])
@pytest.mark.parametrize("what", ["lost", "refused", "failed", "aborted", "no answer"])
def test_what_comes_to_nothing_is_tried_again(when: str, what: str) -> None:
    engine = owing()
    tick(engine)
    request = engine.port.prefilled[-1]
    name = request.request_id
    engine.requests[name] = request
    engine.relay.on_new_request(request)  # type: ignore[arg-type]
    number = engine.schedule(name) if when != "decided" else 0
    if when in ("complete", "prefilled"):
        engine.complete(number, len(TOKENS))
    if when == "prefilled":
        engine.step(name)
    match what:
        case "lost":
            engine.lose()
            engine.connect(proof=TOKENS)
        case "refused":
            engine.say(m.Refused(number, "capacity", "full"))
        case "failed":
            engine.say(m.Failed(number, "internal", "no"))
        case "aborted":
            engine.relay.aborted(name)
        case "no answer":
            tick(engine, 200)
    if when != "prefilled" and what != "aborted":
        assert engine.step(name).outputs == []
    told = what == "lost" or (number and what != "no answer") or when == "prefilled"
    if told or what == "aborted":
        assert not engine.relay._by_request and not engine.relay._sessions
        tick(engine, 300)
        assert len(engine.port.prefilled) == 2
    assert engine.port.out == [] and not engine.counts().fallbacks
    assert engine.add("b").max_tokens == 8


def test_one_that_says_it_of_anything_else_is_not_believed() -> None:
    engine = Engine()
    number = engine.started()
    engine.say(m.Proven(number, True, ""))
    assert engine.counts().fallbacks == {"failed_protocol": 1}
    engine = owing()
    name, number = begun(engine)
    engine.say(m.Proven(number, True, "before anything has come"))
    assert not engine.receiver.proven
    engine.step(name)
    assert not engine.relay._by_request


@pytest.mark.parametrize("most", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("whose", ["receiver", "vllm"])
def test_the_prompt_is_one_that_vllm_can_have(most: int, whose: str) -> None:
    """vLLM's engine dies of an empty prompt, and of one that is longer than its model's."""
    engine = Engine()
    engine.lose()
    if whose == "vllm":
        engine.port.max_model_len = most
    engine.connect(proof=TOKENS, max_tokens=most if whose == "receiver" else 60)
    engine.port.idle = True
    tick(engine)
    asked = [request.prompt_token_ids for request in engine.port.prefilled]
    assert asked == ([TOKENS[: most - 2]] if most > 2 else [])
    assert engine.add().max_tokens == 8


def test_replaced_weights_are_not_compared() -> None:
    engine = owing()
    engine.port.weights_changed = True
    tick(engine)
    assert not engine.port.prefilled


def test_what_was_not_to_be_decoded_is_not_emitted() -> None:
    engine = owing()
    name, number = begun(engine)
    engine.complete(number, len(TOKENS))
    engine.step(name)
    engine.decode(number, 0, 5, finish="length")
    assert engine.port.out == [] and not engine.relay._sessions
    assert engine.counts().events["tokens"] == 0 and not engine.receiver.proven


def test_another_address_is_tried_where_blocks_do_not_arrive() -> None:
    engine = owing()
    _, number = begun(engine)
    engine.relay.unreachable([number])
    assert engine.link.doubts == 1


def test_a_receiver_that_comes_and_goes_is_asked_ever_more_seldom() -> None:
    engine = owing()
    waits = []
    for _ in range(6):
        seconds = 0
        while not engine.port.prefilled:
            tick(engine, seconds)
            seconds += 1
        waits.append(seconds)
        engine.lose()
        engine.put_out(Output(engine.port.prefilled.pop().request_id, [3], "length"))
        engine.connect(proof=TOKENS)
    assert waits[1] >= 5 and waits == sorted(waits) and waits[-1] > 50


def test_a_proof_holds_no_shutdown_up() -> None:
    engine = owing()
    name, _ = begun(engine)
    engine.step(name)
    assert not engine.relay.busy()


def test_any_order() -> None:
    """Whatever happens when: nothing of a proof reaches a client, and nothing of it is left."""
    random_ = random.Random(5)
    for _ in range(400):
        engine = owing()
        tick(engine)
        name = engine.port.prefilled[-1].request_id
        engine.requests[name] = request = engine.port.prefilled[-1]
        number = 0
        for _ in range(12):
            match random_.randrange(10):
                case 0:
                    engine.relay.on_new_request(request)  # type: ignore[arg-type]
                case 1 if not number:
                    number = engine.schedule(name)
                case 2 if number:
                    engine.say(m.Opened(number))
                case 3 if number:
                    engine.say(m.Complete(number, len(TOKENS) * BYTES))
                case 4 if number:
                    try:
                        engine.say(m.Proven(number, random_.random() < 0.5, "text"))
                    except Unusable:
                        engine.lose()
                case 5:
                    engine.lose()
                case 6:
                    engine.connect(proof=TOKENS)
                case 7:
                    engine.port.idle = random_.random() < 0.5
                    tick(engine, random_.choice([0, 10, 100]))
                case 8:
                    engine.relay.abort_all()
                case _:
                    pass
        ours = name in engine.relay._by_request
        assert engine.put_out(Output(name, [3], "length")).outputs == [] or not ours
        engine.lose()
        for other in engine.port.prefilled:
            engine.put_out(Output(other.request_id, [3], "length"))
        assert not engine.relay._sessions and not engine.relay._by_request
        assert engine.port.out == []
