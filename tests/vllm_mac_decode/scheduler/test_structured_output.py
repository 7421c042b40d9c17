"""Requests with a grammar: what the receiver is told, and vLLM's own grammar kept beside it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from mlx_receiver.wire import messages as m
from mlx_receiver.wire.ranges import MAX_GRAMMAR
from mlx_receiver.wire.sampling import Grammar
from tests.vllm_mac_decode.engine import Engine
from vllm_mac_decode.scheduler.grammars import grammar_of
from vllm_mac_decode.scheduler.port import EngineRules


@dataclass
class Structured:
    """``StructuredOutputsParams``."""

    json: Any = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    _backend: str = "xgrammar"


REGEX = {"structured_outputs": Structured(regex="a+")}
RULES = EngineRules()


@pytest.mark.parametrize(
    ("params", "rules", "grammar"),
    [
        (Structured(json={"a": 1}), RULES, Grammar("json", '{"a": 1}', closed=True)),
        (Structured(json="{}", _backend="guidance"), RULES, Grammar("json", "{}")),
        (Structured(json="{}", _backend="guidance"), EngineRules(closed_json=True),
         Grammar("json", "{}", closed=True)),
        (Structured(json="{}"), EngineRules(compact_json=True),
         Grammar("json", "{}", closed=True, compact=True)),
        (Structured(json_object=True), RULES, Grammar("json", '{"type": "object"}')),
        (Structured(regex=""), RULES, Grammar("regex", "")),
        (Structured(choice=["a", "é"]), RULES, Grammar("choice", json.dumps(["a", "é"]))),
        (Structured(grammar="root ::= x"), RULES, Grammar("grammar", "root ::= x")),
        (Structured(structural_tag="{}"), RULES,
         Grammar("structural_tag", "{}", closed=True)),
        (Structured(), RULES, None),
    ],
    ids=str,
)  # fmt: skip
def test_every_kind_in_the_wires_words(
    params: Structured, rules: EngineRules, grammar: Grammar | None
) -> None:
    assert grammar_of(params, rules) == grammar  # type: ignore[arg-type]


def opened(engine: Engine) -> m.Open:
    (message,) = [said for said in engine.link.said if isinstance(said, m.Open)]
    return message


def test_the_receiver_is_told_of_the_grammar_and_its_ends() -> None:
    engine = Engine()
    engine.started(eos_token_id=9, all_stop_token_ids={9, 4}, **REGEX)
    sampling = opened(engine).sampling
    assert sampling.grammar == Grammar("regex", "a+")
    assert sampling.ends == [4, 9]


def test_vllms_own_grammar_follows_the_receivers_tokens() -> None:
    engine = Engine()
    number = engine.started(**REGEX)
    engine.decode(number, 1, 11)
    engine.decode(number, 2, 12, 13)
    assert engine.port.advanced == [11, 12, 13]
    assert engine.tokens() == [7, 11, 12, 13]


def test_texts_without_a_grammar_are_not_followed() -> None:
    engine = Engine()
    engine.decode(engine.started(), 1, 11)
    assert engine.port.advanced == []


@pytest.mark.parametrize("logprobs", [None, 0])
def test_where_the_two_grammars_part_vllm_goes_on(logprobs: int | None) -> None:
    engine = Engine()
    number = engine.started(logprobs=logprobs, **REGEX)
    engine.port.refuses = (13,)
    rows = [m.Logprobs([t], [-1.0], 1) for t in (12, 13, 14)] if logprobs is not None else None
    engine.decode(number, 1, 12, 13, 14, logprobs=rows)
    assert engine.tokens() == [7, 12]
    assert engine.port.resumed == [("a", "a-local", [7, 12], 8)]
    counts = engine.counts()
    assert counts.fallbacks == {"grammar": 1} and counts.events["tokens"] == 1
    # It is nobody's fault.
    engine.add("b")
    assert engine.schedule("b")


def test_an_end_that_vllms_grammar_does_not_take_is_no_end() -> None:
    engine = Engine()
    number = engine.started(eos_token_id=9, all_stop_token_ids={9}, **REGEX)
    engine.port.refuses = (9,)
    engine.decode(number, 1, 9, finish="stop")
    assert engine.tokens() == [7]
    assert engine.port.resumed == [("a", "a-local", [7], 8)]
    assert engine.counts().events["completed"] == 0


def test_a_broken_promise_advances_nothing() -> None:
    engine = Engine()
    number = engine.started(**REGEX)
    engine.decode(number, 5, 11)  # positions were left out
    assert engine.port.advanced == []
    assert engine.port.resumed == [("a", "a-local", [7], 8)]


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("kind", [m.Refused, m.Failed])
def test_what_the_receiver_cannot_do_counts_against_nobody(kind: Any, started: bool) -> None:
    engine = Engine()
    for n in range(5):
        name = f"r{n}"
        if started and kind is m.Failed:
            number = engine.started(name, **REGEX)
        else:
            engine.add(name, **REGEX)
            number = engine.schedule(name)
            assert number, "the receiver was given up"
        engine.say(kind(number, m.E_UNSUPPORTED, "a grammar that it cannot compile"))
        assert engine.requests[name].max_tokens == (1 if started and kind is m.Failed else 8)


def test_other_failures_do_count() -> None:
    engine = Engine()
    for n in range(3):
        engine.say(m.Failed(engine.started(f"r{n}"), m.E_INTERNAL, "no"))
    engine.add("b")
    assert engine.counts().local == {"circuit_open": 1}


def test_a_least_length_with_a_grammar_stays_local() -> None:
    engine = Engine()
    engine.add("a", min_tokens=2, **REGEX)
    assert engine.counts().local == {"structured_output": 1}
    engine.add("b", min_tokens=1, **REGEX)
    assert not engine.counts().local


def test_a_grammar_that_is_too_long_stays_local() -> None:
    engine = Engine()
    engine.add("a", structured_outputs=Structured(regex="a" * (MAX_GRAMMAR + 1)))
    assert engine.counts().local == {"out_of_range": 1}


@pytest.mark.parametrize("end", [None, 5])
def test_where_a_model_reasons_first_the_grammar_begins_behind_that(end: int | None) -> None:
    engine = Engine()
    engine.port.rules = EngineRules(reasons=True)
    engine.port.reasoning = end
    engine.started(**REGEX)
    grammar = opened(engine).sampling.grammar
    assert grammar is not None and grammar.after == end


def test_reasoning_without_a_single_last_token_stays_local() -> None:
    engine = Engine()
    engine.port.rules = EngineRules(reasons=True)
    engine.port.reasoning = LookupError("rules of its own")
    engine.add(**REGEX)
    assert engine.counts().local == {"reasoning": 1}
    engine.add("b")  # without a grammar nobody asks
    assert not engine.counts().local
