"""How much is prefilled of what came back, and when nothing is."""

from __future__ import annotations

import time

import pytest

from tests.vllm_mac_decode.plain import Request
from tests.vllm_mac_decode.shadowed import Shadowed, conversation
from vllm_mac_decode.scheduler.shadow import MOST_ENDED


@pytest.fixture
def engine() -> Shadowed:
    return Shadowed()


def test_a_conversation_that_was_pushed_out_is_let_go(engine: Shadowed) -> None:
    number = engine.begin(prompt=[5] * 10)
    engine.receive(number, 1, 20)
    engine.prefixes.held.clear()
    assert engine.rest() is None and engine.counts().skipped == {"evicted": 1}
    engine.receive(number, 21, 20)
    assert engine.rest() is None


def test_what_is_there_already_is_not_computed_again(engine: Shadowed) -> None:
    number = engine.begin()
    engine.receive(number, 1, 30, ends=True)
    engine.prefixes.compute(conversation(*range(11, 40)))  # the next turn came first
    assert engine.rest() is None and not engine.counts().skipped
    assert not engine.relay._shadow._conversations


def test_one_block_less_is_found_where_drafts_are_verified(engine: Shadowed) -> None:
    """vLLM drops the last block of a hit with EAGLE; nothing is given up for it, nor repeated."""
    find = engine.prefixes.find

    def dropped(request: Request) -> tuple[int, float]:
        cached, free = find(request)
        return max(0, cached - engine.prefixes.block), free

    engine.prefixes.find = dropped  # type: ignore[method-assign]
    engine.prefixes.slack = engine.prefixes.block
    number = engine.begin()
    engine.receive(number, 1, 30, ends=True)
    assert engine.run_all() == [12, 20, 28, 32]


def test_no_shadow_is_as_long_as_the_context(engine: Shadowed) -> None:
    """vLLM's engine dies of a prompt that leaves no room for a token."""
    engine.prefixes.longest = 18 - 2
    number = engine.begin()
    engine.receive(number, 1, 12)  # 18 tokens: 16 are in full blocks
    engine.relay.abort(["a"])
    assert engine.run_all() == [12, 16]
    engine.prefixes.longest = 15
    number = engine.begin("b", prompt=[9] * 5)
    engine.receive(number, 1, 12)
    engine.relay.abort(["b"])
    assert engine.run_all() == [12]


def test_many_conversations_do_not_hold_the_engine_up(engine: Shadowed) -> None:
    """One look at vLLM's cache, then vLLM may look for requests."""
    engine.port.idle = False
    for index in range(20):
        number = engine.begin(f"r{index}", prompt=[index + 1] * 5)
        engine.receive(number, 1, 30, ends=True)
        engine.prefixes.compute([*[index + 1] * 5, 7, *range(11, 40)])
    engine.port.idle = True
    looks = 0
    find = engine.prefixes.find

    def counted(request: Request) -> tuple[int, float]:
        nonlocal looks
        looks += 1
        return find(request)

    engine.prefixes.find = counted  # type: ignore[method-assign]
    engine.relay.rest()
    assert looks == 1
    assert engine.rest() is None and looks == 20


def test_a_full_cache_is_left_alone(engine: Shadowed) -> None:
    number = engine.begin()
    engine.receive(number, 1, 20, ends=True)
    engine.prefixes.free = 0.2
    assert engine.rest() is None and engine.counts().skipped == {"no_room": 1}
    assert not engine.prefixes.queued


def test_what_vllm_does_not_run_is_taken_back(engine: Shadowed) -> None:
    number = engine.begin()
    engine.receive(number, 1, 20)
    shadow = engine.rest()
    assert shadow is not None
    engine.relay.on_new_request(shadow)  # type: ignore[arg-type]
    engine.relay.tick(time.monotonic())
    assert not engine.prefixes.withdrawn
    engine.relay._shadow.look(engine.port, time.monotonic() + 2)  # type: ignore[arg-type]
    assert engine.prefixes.withdrawn == [shadow.request_id]
    engine.relay.aborted(shadow.request_id)
    assert engine.rest() is None


def test_what_has_ended_is_bounded(engine: Shadowed) -> None:
    engine.port.idle = False
    for index in range(MOST_ENDED + 10):
        prompt = [index + 1] * 5
        number = engine.begin(f"r{index}", prompt=prompt)
        engine.receive(number, 1, 12, ends=True)
    assert len(engine.relay._shadow._conversations) == MOST_ENDED
    assert engine.counts().skipped == {"too_many": 10}
    engine.port.idle = True
    assert len(engine.run_all()) == 2 * MOST_ENDED
    assert {tokens[0] for _, tokens in engine.prefixes.held if len(tokens) == 16} == set(
        range(11, MOST_ENDED + 11)
    ), "the oldest ones were dropped"


def test_chunks_are_whole_blocks_and_at_least_one() -> None:
    for chunk, most, step in (
        (1, 64, 4),
        (7, 64, 4),
        (8, 64, 8),
        (100, 65, 64),
        (8, 8, 4),
        (8, 5, 4),
    ):
        engine = Shadowed(shadow_chunk=chunk)
        engine.prefixes.most_tokens = most
        number = engine.begin(prompt=[3] * 4, max_tokens=70)
        engine.receive(number, 1, 50, ends=True)
        lengths = engine.run_all()
        assert lengths == [*range(4 + step, 52, step), 52][: len(lengths)] and lengths[-1] == 52
