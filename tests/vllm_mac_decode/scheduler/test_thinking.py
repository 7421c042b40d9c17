"""Requests with a thinking budget: what the receiver is told, and how vLLM goes on."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_receiver.wire import messages as m
from mlx_receiver.wire.ranges import MAX_INT
from mlx_receiver.wire.sampling import Thinking
from tests.vllm_mac_decode.engine import Engine
from tests.vllm_mac_decode.scheduler.test_structured_output import REGEX, opened
from vllm_mac_decode.scheduler.port import EngineRules

#: PROMPT ends with the start.
V1 = Thinking(0, [3], [20, 21, 22], [20, 21, 22], "v1")
V2 = Thinking(0, [3], [22], [20, 21, 22], "v2")


def reasoning(rule: Thinking | None) -> Engine:
    engine = Engine()
    engine.port.rules = EngineRules(thinking=rule)
    return engine


@pytest.mark.parametrize("rule", [V1, V2])
def test_the_receiver_is_told_of_the_budget(rule: Thinking) -> None:
    engine = reasoning(rule)
    engine.started(thinking_token_budget=5)
    told = opened(engine).sampling.thinking
    assert told is not None and told.budget == 5
    assert (told.start, told.end, told.forced, told.runner) == (
        rule.start, rule.end, rule.forced, rule.runner
    )  # fmt: skip


def test_a_budget_beyond_every_text_is_told_as_the_largest_number() -> None:
    engine = reasoning(V1)
    engine.started(thinking_token_budget=1 << 40)
    assert opened(engine).sampling.thinking == Thinking(MAX_INT, V1.start, V1.end, V1.end, "v1")


def test_requests_without_a_budget_have_none() -> None:
    engine = reasoning(V1)
    engine.started()
    assert opened(engine).sampling.thinking is None


@pytest.mark.parametrize(
    ("rule", "params", "local"),
    [(None, {}, True), (V1, {"logprobs": 0}, True), (V1, {"logprob_token_ids": [4]}, True),
     (V2, {"logprobs": 0}, False), (Thinking(0, [3], [22], [22], "v1"), {"logprobs": 0}, False)],
    ids=str,
)  # fmt: skip
def test_what_vllm_could_not_go_on_with_stays_local(
    rule: Thinking | None, params: dict[str, Any], local: bool
) -> None:
    engine = reasoning(rule)
    engine.add(thinking_token_budget=5, **params)
    assert engine.counts().local == ({"thinking_budget": 1} if local else {})


def lost_after(engine: Engine, *tokens: int, budget: int = 2, **params: Any) -> list[int]:
    """What a continuation begins with, when the receiver breaks off behind these tokens."""
    number = engine.started(thinking_token_budget=budget, **params)
    for position, token in enumerate(tokens, 1):
        engine.decode(number, position, token)
    engine.lose()
    ((_, _, resumed, limit),) = engine.port.resumed
    assert limit == 8
    assert engine.tokens() == resumed
    return resumed


def test_a_forced_end_that_breaks_off_is_completed_first() -> None:
    assert lost_after(reasoning(V1), 10, 20) == [7, 10, 20, 21, 22]
    assert lost_after(reasoning(V1), 10, 20, 21) == [7, 10, 20, 21, 22]


@pytest.mark.parametrize("tokens", [(), (10,), (10, 20, 21, 22), (10, 20, 21, 22, 20), (20,)])
def test_where_none_is_begun_nothing_is_added(tokens: tuple[int, ...]) -> None:
    assert lost_after(reasoning(V1), *tokens) == [7, *tokens]


def test_model_runner_v2_completes_it_itself() -> None:
    assert lost_after(reasoning(V2), 10, 20) == [7, 10, 20]


def test_one_that_ends_the_text_or_does_not_fit() -> None:
    assert lost_after(reasoning(V1), 10, 20, stop_token_ids=[22]) == [7, 10, 20]
    engine = reasoning(V1)
    number = engine.started(thinking_token_budget=2, max_tokens=4)
    engine.decode(number, 1, 10)
    engine.decode(number, 2, 20)
    engine.lose()
    assert engine.port.out[-2:] == [("a", [21], ""), ("a", [], "length")]


def test_vllms_grammar_follows_what_is_added() -> None:
    engine = reasoning(V1)
    assert lost_after(engine, 10, 20, **REGEX) == [7, 10, 20, 21, 22]
    assert engine.port.advanced == [10, 20, 21, 22]
    engine = reasoning(V1)
    engine.port.refuses = (22,)
    assert lost_after(engine, 10, 20, **REGEX) == [7, 10, 20, 21]


def test_a_request_that_is_given_up_at_its_first_token() -> None:
    """vLLM has sampled one of the forced tokens, and ends the request."""
    engine = reasoning(V1)
    engine.add(thinking_token_budget=0)
    number = engine.schedule()
    engine.say(m.Failed(number, m.E_INTERNAL, "no"))
    engine.step(token=20, finished=True)
    assert engine.port.resumed == [("a", "a-local", [20, 21, 22], 8)]
