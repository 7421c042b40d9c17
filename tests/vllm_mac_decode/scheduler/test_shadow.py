"""Prefill of what came back, in every order of events, without vLLM."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.vllm_mac_decode.plain import Output, Outputs, Request, Stats
from tests.vllm_mac_decode.shadowed import PROMPT, Shadowed, conversation
from vllm_mac_decode.settings import Settings, SettingsError, load


@pytest.fixture
def engine() -> Shadowed:
    return Shadowed()


def test_chunk_by_chunk_while_the_receiver_decodes(engine: Shadowed) -> None:
    number = engine.begin()
    engine.receive(number, 1, 6)
    assert engine.rest() is None, "a chunk ends at token 12, and has none of the newest one"
    woken = engine.port.woken
    engine.receive(number, 7, 1)
    assert engine.port.woken == woken + 1
    shadow = engine.rest()
    assert shadow is not None
    assert shadow.prompt_token_ids == conversation(11, 12, 13, 14, 15, 16, 17)
    engine.receive(number, 8, 20)
    assert engine.rest() is None, "one at a time"
    went = engine.run(shadow)
    assert went.outputs == [] and not [out for out in engine.port.out if out[0] != "a"]
    assert engine.run_all() == [20, 28]
    counts = engine.counts()
    assert counts.events["shadow_tokens"] == 24 and not counts.skipped and not counts.local


def test_the_rest_of_it_when_it_has_ended(engine: Shadowed) -> None:
    number = engine.begin()
    engine.receive(number, 1, 12, ends=True)
    assert engine.run_all() == [12, 16], "17 tokens have KV where vLLM decodes alone"
    assert engine.run_all() == [] and not engine.relay._shadow._conversations
    number = engine.begin("b", prompt=[9] * 5)
    engine.receive(number, 1, 2, ends=True)
    assert engine.run_all() == [], "7 tokens of 8 have KV: no block more than the prompt's"
    assert not engine.relay._shadow._conversations


def test_what_its_client_gave_up_is_likely_to_come_again(engine: Shadowed) -> None:
    number = engine.begin()
    engine.receive(number, 1, 4)
    engine.relay.abort(["a"])
    assert engine.run_all() == [8]


def test_salts_are_kept(engine: Shadowed) -> None:
    number = engine.begin(salt="mine")
    engine.receive(number, 1, 12, ends=True)
    shadow = engine.rest()
    assert shadow is not None and shadow.cache_salt == "mine"
    other = engine.begin("b", prompt=PROMPT)
    engine.receive(other, 1, 12, ends=True)
    engine.run(shadow)
    engine.run_all()
    assert {salt for salt, tokens in engine.prefixes.held if len(tokens) == 16} == {None, "mine"}


def test_nothing_while_vllm_is_busy(engine: Shadowed) -> None:
    number = engine.begin()
    engine.port.idle = False
    engine.receive(number, 1, 30, ends=True)
    assert engine.rest() is None
    engine.port.idle = True
    assert engine.run_all() == [12, 20, 28, 32]


@pytest.mark.parametrize("added", [True, False], ids=["in the scheduler", "on its way there"])
def test_it_gives_way_to_a_request_that_comes_before_it_began(
    engine: Shadowed, added: bool
) -> None:
    number = engine.begin()
    engine.receive(number, 1, 8)
    shadow = engine.rest()
    assert shadow is not None
    if added:
        engine.relay.on_new_request(shadow)  # type: ignore[arg-type]
    engine.add("b", prompt=[8, 8])
    assert engine.prefixes.withdrawn == [shadow.request_id]
    if added:
        engine.relay.aborted(shadow.request_id)
    else:
        engine.relay.on_new_request(shadow)  # type: ignore[arg-type]
        engine.relay.aborted(shadow.request_id)
    assert engine.counts().skipped == {"busy": 1}
    assert engine.run_all() == [12], "it is tried again"


def test_a_chunk_that_has_begun_is_the_most_that_anybody_waits_for(engine: Shadowed) -> None:
    number = engine.begin()
    engine.receive(number, 1, 30)
    shadow = engine.rest()
    assert shadow is not None
    engine.relay.on_new_request(shadow)  # type: ignore[arg-type]
    engine.relay.scheduled(shadow.request_id, 4)
    engine.port.idle = False
    engine.add("b", prompt=[8, 8])
    assert not engine.prefixes.withdrawn
    engine.put_out(Output(shadow.request_id, [99], "length"))
    assert engine.rest() is None


def test_what_vllm_preempts_is_taken_back(engine: Shadowed) -> None:
    number = engine.begin()
    engine.receive(number, 1, 8)
    shadow = engine.rest()
    assert shadow is not None
    engine.relay.on_new_request(shadow)  # type: ignore[arg-type]
    engine.relay.scheduled(shadow.request_id, 4)
    engine.relay.preempted(shadow.request_id)
    assert engine.prefixes.withdrawn == [shadow.request_id]
    engine.relay.aborted(shadow.request_id)
    assert engine.run_all() == [12]


@pytest.mark.parametrize("when", ["before", "queued", "running", "between"])
def test_a_fallback_computes_the_rest_by_itself(engine: Shadowed, when: str) -> None:
    number = engine.begin()
    engine.receive(number, 1, 20)
    if when in ("queued", "running"):
        shadow = engine.rest()
        assert shadow is not None
        engine.relay.on_new_request(shadow)  # type: ignore[arg-type]
        if when == "running":
            engine.relay.scheduled(shadow.request_id, 4)
    elif when == "between":
        shadow = engine.rest()
        assert shadow is not None
        engine.run(shadow)
    engine.lose()
    assert engine.port.resumed[0][1] == "a-local"
    continuation = Request("a-local", [*PROMPT, 7], engine.requests["a"].sampling_params)
    engine.relay.on_new_request(continuation)  # type: ignore[arg-type]
    assert bool(engine.prefixes.withdrawn) is (when == "queued"), "a continuation is somebody's"
    if when == "running":
        assert engine.put_out(Output(shadow.request_id, [99], "length")).outputs == []
    elif when == "queued":
        engine.relay.aborted(shadow.request_id)
    went = engine.put_out(Output("a-local", [40], "length"))
    assert [o.request_id for o in went.outputs] == ["a"]
    assert engine.rest() is None and not engine.relay._shadow._conversations


def test_a_lost_receiver_leaves_what_has_ended(engine: Shadowed) -> None:
    number = engine.begin()
    engine.receive(number, 1, 12, ends=True)
    engine.lose()
    assert engine.run_all() == [12, 16]


def test_pauses_and_ends(engine: Shadowed) -> None:
    number = engine.begin()
    engine.receive(number, 1, 20)
    engine.relay.freeze()
    assert engine.counts().fallbacks == {"paused": 1}
    assert engine.rest() is None
    engine.put_out(Output("a-local", [40], "length"))
    number = engine.begin("b", prompt=[9] * 5)
    engine.receive(number, 1, 20)
    shadow = engine.rest()
    assert shadow is not None
    assert engine.relay.rejects(shadow.request_id, True) is None, "vLLM's own rule"
    engine.relay.aborted(shadow.request_id)
    engine.relay.abort_all()
    engine.port.idle = False  # as it is while vLLM drains, sleeps or is paused
    assert engine.rest() is None
    assert not engine.relay.busy()


def test_other_weights_have_other_kv(engine: Shadowed) -> None:
    number = engine.begin()
    engine.receive(number, 1, 20, ends=True)
    engine.port.weights_changed = True
    assert engine.rest() is None
    engine.port.weights_changed = False
    assert engine.rest() is None


def test_an_emptied_cache(engine: Shadowed) -> None:
    number = engine.begin()
    engine.receive(number, 1, 30, ends=True)
    shadow = engine.rest()
    assert shadow is not None
    assert engine.relay.cache_reset() == []  # it is still in vLLM's input
    assert engine.prefixes.withdrawn == [shadow.request_id]
    number = engine.begin("b", prompt=[9] * 5)
    engine.receive(number, 1, 30, ends=True)
    shadow = engine.rest()
    assert shadow is not None
    engine.relay.on_new_request(shadow)  # type: ignore[arg-type]
    engine.relay.scheduled(shadow.request_id, 4)
    assert engine.relay.cache_reset() == [shadow.request_id]
    engine.relay.aborted(shadow.request_id)
    assert engine.rest() is None


def test_comparing_caches_comes_first(engine: Shadowed) -> None:
    number = engine.begin()
    engine.receive(number, 1, 30, ends=True)
    engine.receiver.proven = False
    assert engine.rest() is None
    engine.receiver.proven = True
    assert engine.rest() is not None


@pytest.mark.parametrize("off", ["setting", "no prefix cache"])
def test_it_may_be_off(off: str) -> None:
    engine = Shadowed(shadow_prefill=off != "setting")
    prefixes = engine.prefixes
    if off != "setting":
        engine.port.prefixes = None
    number = engine.started(prompt=PROMPT, max_tokens=40)
    engine.receive(number, 1, 20, ends=True)
    engine.relay.rest()
    assert not prefixes.queued and not engine.relay._shadow._conversations


def test_an_unknown_vllm_only_loses_this(engine: Shadowed) -> None:
    number = engine.begin()
    engine.receive(number, 1, 20)
    engine.prefixes.broken = True
    assert engine.rest() is None
    engine.prefixes.broken = False
    assert engine.rest() is None
    engine.receive(number, 21, 1, ends=True)
    assert engine.port.out[-1] == ("a", [0], "stop")


def test_what_vllm_says_of_itself(engine: Shadowed) -> None:
    number = engine.begin()
    engine.receive(number, 1, 20)
    shadow = engine.rest()
    assert shadow is not None

    def told(**others: Any) -> tuple[int, int]:
        stats = Stats(num_running_reqs=1, num_waiting_reqs=1)
        outputs = Outputs([], stats, **others)
        engine.relay.rewrite({0: outputs})  # type: ignore[dict-item]
        assert not outputs.finished_requests
        return stats.num_running_reqs - 1, stats.num_waiting_reqs  # one runs on the receiver

    assert told() == (1, 1), "vLLM's scheduler has not seen it"
    engine.relay.on_new_request(shadow)  # type: ignore[arg-type]
    assert told() == (1, 0)
    engine.relay.scheduled(shadow.request_id, 4)
    assert told() == (0, 1)
    assert told() == (0, 1)
    engine.put_out(Output(shadow.request_id, [99], "length"))
    assert told(finished_requests={shadow.request_id}) == (1, 1)
    assert engine.prefixes.discounted == [(1, 13, 4)], "once, with the step that told it"


def test_settings() -> None:
    assert load({}, {"MAC_DECODE_SHADOW_PREFILL": "false"}).shadow_prefill is False
    assert (Settings().shadow_prefill, Settings().shadow_chunk) == (True, 256)
    with pytest.raises(SettingsError, match="shadow_chunk must be 1 to 65536 tokens"):
        load({"shadow_chunk": 0}, {})


def test_any_order() -> None:
    """Whatever happens when: clients see their own tokens only, vLLM has one shadow at most, and
    what is cached is what the conversations say."""
    for seed in range(300):
        source = random.Random(seed)
        engine = Shadowed()
        numbers: dict[str, tuple[int, int]] = {}
        shadow: Request | None = None
        stage = ""
        for event in range(60):
            match source.randrange(14):
                case 0 if len(numbers) < 4:
                    name = f"r{event}"
                    numbers[name] = (engine.begin(name, prompt=[event + 1] * 5), 1)
                case 1 | 2 | 3 if numbers:
                    name = source.choice(list(numbers))
                    number, position = numbers[name]
                    count = min(source.randrange(1, 9), 50 - position)
                    if count > 0:
                        engine.receive(number, position, count)
                        numbers[name] = (number, position + count)
                case 4 if numbers:
                    name = source.choice(list(numbers))
                    number, position = numbers.pop(name)
                    engine.receive(number, position, 1, ends=True)
                case 5 if numbers:
                    name = source.choice(list(numbers))
                    engine.relay.abort([name])
                    del numbers[name]
                case 6:
                    engine.port.idle = source.random() < 0.6
                case 7 | 8:
                    got = engine.rest()
                    if got is not None:
                        assert engine.port.idle and shadow is None
                        shadow, stage = got, "queued"
                case 9 if shadow is not None and stage == "queued":
                    engine.relay.on_new_request(shadow)  # type: ignore[arg-type]
                    stage = "added"
                case 10 if shadow is not None and stage == "added":
                    cached = engine.prefixes.find(shadow)[0]
                    assert shadow.num_prompt_tokens - cached <= 13
                    engine.relay.scheduled(shadow.request_id, cached)
                    stage = "running"
                case 11 if shadow is not None and stage == "running":
                    engine.prefixes.compute(shadow.prompt_token_ids)
                    assert not engine.put_out(Output(shadow.request_id, [99], "length")).outputs
                    shadow = None
                case 12 if event % 3 == 0:
                    engine.lose()
                    engine.connect()
                    numbers.clear()
                case 13 if shadow is not None and source.random() < 0.5:
                    engine.relay.preempted(shadow.request_id)
                case _:
                    pass
            if engine.prefixes.withdrawn:
                gone = engine.prefixes.withdrawn.pop()
                assert shadow is not None and gone == shadow.request_id
                engine.relay.aborted(gone)
                shadow = None
            if source.random() < 0.05:
                engine.prefixes.held.clear()
        if shadow is not None:
            engine.relay.aborted(shadow.request_id)
        engine.relay.abort([*numbers])
        engine.port.idle = True
        engine.run_all()
        assert not engine.relay._shadow._conversations and engine.relay._shadow._asked is None
        assert all(request in engine.requests for request, _, _ in engine.port.out)
        assert all(token != 99 for _, tokens, _ in engine.port.out for token in tokens)
