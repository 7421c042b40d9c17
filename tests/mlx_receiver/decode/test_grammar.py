"""Grammars by themselves: what each kind allows, and what a stranger's may cost."""

from __future__ import annotations

import concurrent.futures
import gc
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from mlx_receiver.decode.grammar import compiling, trial
from mlx_receiver.decode.grammar.compiling import Grammars
from mlx_receiver.decode.grammar.matcher import Matcher
from mlx_receiver.decode.model import find_model
from mlx_receiver.http.openai.tokenizer import Tokenizer
from mlx_receiver.wire.messages import WireError
from mlx_receiver.wire.ranges import MAX_GRAMMAR
from mlx_receiver.wire.sampling import Grammar, Sampling

EOS = 2
OBJECT = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer"}},
    "required": ["ok"],
}
TOOL = {
    "type": "tag",
    "begin": '<tool_call>\n{"name": "weather", "arguments": ',
    "content": {"type": "json_schema", "json_schema": OBJECT, "style": "json"},
    "end": "}\n</tool_call>",
}


@pytest.fixture(scope="module")
def grammars(tiny_llama_path: Path) -> Iterator[Grammars]:
    made = Grammars(find_model(str(tiny_llama_path)))
    yield made
    made.close()


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_path: Path) -> Tokenizer:
    return Tokenizer(find_model(str(tiny_llama_path)))


def begun(grammars: Grammars, kind: Any, text: Any, **fields: Any) -> Matcher:
    text = text if isinstance(text, str) else json.dumps(text)
    grammar = Grammar(kind, text, **fields)
    return grammars.compile(grammar).result(60).begin([EOS], grammar.after)


def takes(matcher: Matcher, tokens: list[int]) -> bool:
    """Whether the tokens may come one after the other, each by the mask that was before it."""
    for token in tokens:
        allowed = matcher.allowed()
        assert allowed is None or allowed.shape == (49_152,)
        if allowed is not None and not allowed[token]:
            return False
        matcher.accept(token)
        assert not matcher.fault
    return True


def tagged(format_: Any) -> dict[str, Any]:
    return {"type": "structural_tag", "format": format_}


CALL = '<tool_call>\n{"name": "weather", "arguments": {"ok": true}}\n</tool_call>'
ONE = tagged({"type": "tags_with_separator", "tags": [TOOL], "separator": "",
              "at_least_one": True, "stop_after_first": True})  # fmt: skip

KINDS: list[tuple[str, Any, dict[str, Any], list[str], list[str]]] = [
    ("json", OBJECT, {}, ['{"ok": true}', '{\n "ok" : false, "n": 12 }', '{"ok":true,"z":1}'],
     ['{"n": 1}', "[]", '{"ok": 1}', 'text']),
    ("json", OBJECT, {"closed": True}, ['{"ok": true}'], ['{"ok":true,"z":1}']),
    ("json", OBJECT, {"compact": True}, ['{"ok":true}'], ['{"ok": true}']),
    ("json", {"type": "object"}, {}, ['{"a": [1, {"b": null}]}', "{}"], ["[]", "1"]),
    ("json", {"oneOf": [{"type": "integer"}, {"type": "null"}]}, {}, ["1", "null"], ["true"]),
    ("json", OBJECT | {"x-guidance": {"whitespace_flexible": False}}, {}, ['{"ok" : true}'], []),
    ("regex", "[a-c]{3}-[0-9]{2}", {}, ["abc-12"], ["abd-12", "abc-1"]),
    ("regex", "^a+$", {}, ["aaa"], ["b"]),
    ("regex", "a/b|c\\/d", {}, ["a/b", "c/d"], ["a"]),
    ("choice", ["yes", "né", "a \"b\"\n", "😀"], {}, ["yes", "né", 'a "b"\n', "😀"], ["ye"]),
    ("grammar", 'root ::= "a" b\nb ::= "x" | "y" b\n', {}, ["ayyx"], ["ay", "x"]),
    ("grammar", 'start: "a" B\nB: /[0-9]+/\n', {}, ["a12"], ["a"]),
    ("structural_tag", ONE, {}, [CALL], ["hello", CALL + CALL, CALL.replace("weather", "time")]),
    ("structural_tag",
     {"structures": [{"begin": "<f=a>", "schema": OBJECT, "end": "</f>"}], "triggers": ["<f="]},
     {}, ["hello", 'so <f=a>{"ok":true}</f> and', "a < b"], ["<f=b>", "<f=a>1</f>"]),
    ("structural_tag",
     tagged({"type": "sequence", "elements": [
         {"type": "const_string", "value": "id:"}, {"type": "regex", "pattern": "a/[0-9]+"},
         {"type": "optional", "content": {"type": "const_string", "value": "!"}}]}),
     {}, ["id:a/12", "id:a/1!"], ["id:", "id:a/1!!"]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text", "fields", "good", "bad"), KINDS)
def test_a_kind_allows_what_it_says(
    grammars: Grammars,
    tokenizer: Tokenizer,
    kind: str,
    text: Any,
    fields: dict[str, Any],
    good: list[str],
    bad: list[str],
) -> None:
    for candidate in [*good, *bad]:
        matcher = begun(grammars, kind, text, **fields)
        tokens = [*tokenizer.encode(candidate, special=False), EOS]
        assert takes(matcher, tokens) == (candidate in good), candidate


def test_an_end_comes_only_where_the_text_is_complete_and_then_alone(
    grammars: Grammars, tokenizer: Tokenizer
) -> None:
    matcher = begun(grammars, "choice", ["yes"])
    (yes,) = tokenizer.encode("yes", special=False)
    allowed = matcher.allowed()
    assert allowed is not None and allowed[yes] and not allowed[EOS]
    matcher.accept(yes)
    allowed = matcher.allowed()
    assert allowed is not None and np.flatnonzero(allowed).tolist() == [EOS]
    matcher.accept(EOS)
    assert matcher.allowed() is None and not matcher.fault
    matcher.accept(17)  # as ignore_eos lets a text go on
    assert matcher.allowed() is None and not matcher.fault


def test_an_end_that_is_text_too_is_an_end(grammars: Grammars, tokenizer: Tokenizer) -> None:
    """A stop token is never part of the text, as with xgrammar's ``override_stop_tokens``."""
    grammar = Grammar("regex", "a*ba*")
    a, b = (tokenizer.encode(text, special=False)[0] for text in "ab")
    matcher = grammars.compile(grammar).result(60).begin([EOS, a], None)
    allowed = matcher.allowed()
    assert allowed is not None and not allowed[a] and allowed[b]
    matcher.accept(b)
    allowed = matcher.allowed()
    assert allowed is not None and allowed[a] and allowed[EOS]


def test_what_comes_before_the_end_of_reasoning_is_free(
    grammars: Grammars, tokenizer: Tokenizer
) -> None:
    matcher = begun(grammars, "choice", ["yes"], after=500)
    assert takes(matcher, [7, EOS, 8, 500])
    assert not takes(matcher, tokenizer.encode("no", special=False))
    assert takes(matcher, [*tokenizer.encode("yes", special=False), EOS])


def test_a_token_that_cannot_come_is_a_fault(grammars: Grammars, tokenizer: Tokenizer) -> None:
    matcher = begun(grammars, "choice", ["yes"])
    matcher.accept(tokenizer.encode("no", special=False)[0])
    assert "cannot follow" in matcher.fault and matcher.allowed() is None
    early = begun(grammars, "choice", ["yes"])
    early.accept(EOS)
    assert "cannot follow" in early.fault


def test_a_step_that_takes_too_long_is_a_fault(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_receiver.decode.grammar.matcher.SLOW_SECONDS", 0.0)
    matcher = begun(grammars, "json", OBJECT)
    matcher.allowed()
    assert "simplify it" in matcher.fault


def test_texts_of_one_grammar_do_not_touch_each_other(
    grammars: Grammars, tokenizer: Tokenizer
) -> None:
    one, other = begun(grammars, "json", OBJECT), begun(grammars, "json", OBJECT)
    assert takes(one, tokenizer.encode('{"ok": tr', special=False))
    assert takes(other, [*tokenizer.encode('{"ok": false}', special=False), EOS])
    assert takes(one, tokenizer.encode("ue", special=False))


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def intricate(tokens: int) -> str:
    """The lexer follows all of them at once, from the first letter on."""
    names = " | ".join(f"T{i}" for i in range(tokens))
    letters = (f"[a-z]{{1,{i % 400 + 2}}}[0-9 ]{{1,{i + 1}}}" for i in range(tokens))
    return "\n".join([f"start: {names}", *(f"T{i}: /({x})+{i}/" for i, x in enumerate(letters))])


def endless(number: int) -> Grammar:
    """One that takes minutes to compile."""
    return Grammar("json", json.dumps({"type": "integer", "multipleOf": 99_999_999 - number}))


HOSTILE: list[tuple[str, Any]] = [
    ("json", {"type": "integer", "multipleOf": 99_999_999}),
    ("json", {"type": "array", "items": {"type": "integer"}, "minItems": 100_000}),
    ("json", nested(200)),
    ("json", '{"a":' * 20_000 + "1" + "}" * 20_000),
    ("json", "[" * 60_000),
    ("json", {"$ref": "http://example.com/x.json"}),
    ("json", "not JSON"),
    ("json", 7),
    ("regex", "(?=a)b"),
    ("regex", "(" * 5000 + "a" + ")" * 5000),
    ("regex", "(((a{1,1000}b){1,1000}c){1,1000}d){1,1000}"),
    ("regex", "a" * (MAX_GRAMMAR - 1)),
    ("regex", "|".join(f"w{i}x" for i in range(15_000))),
    ("grammar", 'root ::= "'),
    ("grammar", "root ::= " + "( " * 5000 + '"a"' + " )" * 5000),
    ("grammar", 'start: s{1,100000}\ns: t{1,100000}\nt: "a"{1,100000}\n'),
    ("grammar", 'start: s\ns: s s s s | s s | "a"\n'),
    ("grammar", intricate(400)),
    ("choice", [f"choice {i}" for i in range(8000)]),
    ("choice", {"a": 1}),
    ("structural_tag", tagged({"type": "any_tokens"})),
    ("structural_tag", tagged(None)),
    ("structural_tag", {}),
    ("structural_tag", {"structures": [{"begin": "x"}], "triggers": []}),
]


@pytest.mark.parametrize(("kind", "text"), HOSTILE)
def test_no_grammar_holds_anything_up(grammars: Grammars, kind: str, text: Any) -> None:
    """Refused with a reason, or usable with steps that are short."""
    began = time.process_time()
    try:
        matcher = begun(grammars, kind, text)
    except WireError as error:
        assert error.code == "unsupported" and 20 < len(error.reason) < 600
    else:
        for _ in range(20):
            if (allowed := matcher.allowed()) is None:
                break
            candidates = np.flatnonzero(allowed)
            matcher.accept(int(candidates[len(candidates) // 2]))
    assert time.process_time() - began < 2 * trial.SECONDS
    # Whatever became of it, the next one is compiled.
    assert begun(grammars, "choice", ["yes"]).allowed() is not None


def test_one_that_is_too_long_does_not_pass_the_wire() -> None:
    grammar = Grammar("regex", "a" * (MAX_GRAMMAR + 1))
    raw = msgspec.msgpack.encode(Sampling(max_tokens=2, grammar=grammar))
    with pytest.raises(msgspec.ValidationError, match=re.escape("grammar.text")):
        msgspec.msgpack.decode(raw, type=Sampling)


def test_a_grammar_is_compiled_once_and_few_are_kept(
    tiny_llama_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "MAX_GRAMMARS", 2)
    grammars = Grammars(find_model(str(tiny_llama_path)))
    try:
        first = grammars.compile(Grammar("regex", "a"))
        assert grammars.compile(Grammar("regex", "a", after=7)) is first
        others = [grammars.compile(Grammar("regex", text)) for text in "bc"]
        assert grammars.compile(Grammar("regex", "c")) is others[1]
        assert grammars.compile(Grammar("regex", "a")) is not first
        first.result(60)
    finally:
        grammars.close()


def test_only_so_many_wait(tiny_llama_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "MAX_WAITING", 2)
    grammars = Grammars(find_model(str(tiny_llama_path)))
    try:
        futures = [grammars.compile(Grammar("regex", text)) for text in "abc"]
        with pytest.raises(WireError, match="wait to be compiled"):
            futures[2].result(0)
        futures[1].result(60)
    finally:
        grammars.close()
    with pytest.raises(WireError, match="stopping"):
        grammars.compile(Grammar("regex", "z")).result(0)


def test_one_whose_first_step_takes_long_is_refused(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Grammar("grammar", intricate(100))
    begun(grammars, "choice", ["yes"])  # which loads the tokenizer
    assert trial._answer(slow, grammars._tokenizer)["error"] == ""
    monkeypatch.setattr(trial, "STEP_SECONDS", 0.001)
    answer = trial._answer(slow, grammars._tokenizer)
    assert re.fullmatch("its first step takes [0-9]+ ms: simplify it", answer["error"])
    assert answer["grammar"] == ""


def test_a_text_begins_with_a_step_that_is_there(grammars: Grammars) -> None:
    """However long that takes, running responses do not wait for it."""
    matcher = begun(grammars, "grammar", intricate(100))
    gc.disable()  # which may take longer than that
    try:
        began = time.thread_time()
        assert matcher.allowed() is not None
        took = time.thread_time() - began
    finally:
        gc.enable()
    assert took < 0.005  # else some 15 ms


def test_others_do_not_wait_for_those_that_take_long(tiny_llama_path: Path) -> None:
    grammars = Grammars(find_model(str(tiny_llama_path)))
    try:
        slow = [grammars.compile(endless(number)) for number in range(3)]
        grammars.compile(Grammar("regex", "a")).result(60)
        assert not slow[-1].done()
        assert isinstance(error := slow[0].exception(60), WireError)
        assert error.code == "unsupported" and "more than 3 s" in error.reason
        # It is known now, and what follows is as quick as before.
        assert grammars.compile(endless(0)).done()
        grammars.compile(Grammar("regex", "b")).result(60)
        assert not slow[-1].done()
    finally:
        grammars.close()
    for future in slow[1:]:
        assert isinstance(error := future.exception(0), WireError)
        assert error.code == "shutdown"


def test_what_closing_interrupts_says_so(
    tiny_llama_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a thread finds its process ended before it is told why."""
    grammars = Grammars(find_model(str(tiny_llama_path)))
    grammars.compile(Grammar("regex", "a")).result(60)
    future = grammars.compile(endless(0))
    trial = grammars._trial
    assert trial is not None
    close = trial.close

    def close_first() -> None:
        close()
        concurrent.futures.wait([future], 10)

    monkeypatch.setattr(trial, "close", close_first)
    grammars.close()
    assert isinstance(error := future.exception(0), WireError)
    assert error.code == "shutdown"


def test_only_so_many_of_those_that_take_long_wait(
    tiny_llama_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "MAX_SLOW", 1)
    grammars = Grammars(find_model(str(tiny_llama_path)))
    try:
        first, second = (grammars.compile(endless(number)) for number in range(2))
        assert isinstance(error := second.exception(60), WireError)
        assert error.code == "capacity" and not first.done()
        assert first.exception(60) is not None
        # The place is free again, and the second one was not forbidden.
        third = grammars.compile(endless(1))
        assert third is not second
        assert isinstance(error := third.exception(60), WireError)
        assert error.code == "unsupported"
    finally:
        grammars.close()


def test_closing_ends_one_that_compiles(tiny_llama_path: Path) -> None:
    grammars = Grammars(find_model(str(tiny_llama_path)))
    grammars.compile(Grammar("regex", "a")).result(60)
    slow = grammars.compile(Grammar("json", json.dumps(HOSTILE[0][1])))
    began = time.monotonic()
    grammars.close()
    with pytest.raises(WireError):
        slow.result(20)
    assert time.monotonic() - began < 10


def test_who_was_refused_is_forgotten(tiny_llama_path: Path) -> None:
    """An exception that is raised again and again would keep alive all who raised it."""
    grammars = Grammars(find_model(str(tiny_llama_path)))
    refused = Grammar("regex", "(?=a)b")
    errors = []
    try:
        for _ in range(3):
            error = grammars.compile(refused).exception(20)
            assert isinstance(error, WireError) and error.code == "unsupported"
            errors.append(error)
        assert len(set(map(id, errors))) == 3
        assert grammars._trial is not None
        good = Grammar("regex", "[ab]+")
        compiled = grammars.compile(good)
        compiled.result(20)
        for number in range(80):  # refusals push out nothing that is in use
            assert grammars.compile(Grammar("regex", f"(?=a)b{number}")).exception(20)
        assert grammars.compile(good) is compiled
    finally:
        grammars.close()


def test_a_trial_that_somebody_has_killed_is_nobodys_fault(tiny_llama_path: Path) -> None:
    grammars = Grammars(find_model(str(tiny_llama_path)))
    try:
        grammars.compile(Grammar("regex", "[ab]+")).result(20)
        assert grammars._trial is not None and grammars._trial._process is not None
        process = grammars._trial._process
        process.kill()
        process.wait()
        grammars.compile(Grammar("regex", "[cd]+")).result(20)
        assert grammars._trial._process is not process
    finally:
        grammars.close()


def test_branches_of_all_of_leave_each_other_room(grammars: Grammars, tokenizer: Tokenizer) -> None:
    def branch(name: str) -> dict[str, Any]:
        return {"type": "object", "properties": {name: {"type": "integer"}}, "required": [name]}

    both = json.dumps({"allOf": [branch("a"), branch("b")]})
    text = tokenizer.encode('{"a": 1, "b": 2}', special=False)
    assert takes(begun(grammars, "json", both, closed=True), text)
