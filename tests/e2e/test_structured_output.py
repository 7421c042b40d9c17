"""Structured output: decoded by the receiver, and each text valid for whoever asked for it."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.servers import Receiver, Vllm, pair, start_receiver

pytestmark = pytest.mark.server

PROMPT = "The weather report of the town as data: "
#: Bounded, so that the texts of a random model end.
SCHEMA = {
    "type": "object",
    "properties": {
        "town": {"type": "string", "maxLength": 10},
        "sky": {"enum": ["clear", "grey"]},
        "wind": {"type": "array", "items": {"enum": [1, 22, 333]}, "minItems": 2, "maxItems": 4},
    },
    "required": ["town", "sky", "wind"],
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"town": {"enum": ["Rome", "Oslo"]}},
            "required": ["town"],
        },
    },
}
EBNF = 'root ::= "go " place\nplace ::= "north" | "south" | "up and " place\n'
LARK = 'start: "go " PLACE\nPLACE: /north|south/\n'
#: No white space, of which a random model writes as much as it may.
ARGS = (
    "--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}',
    "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
)  # fmt: skip


@pytest.fixture(scope="module")
def compact(
    tiny_llama_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Vllm, Receiver]]:
    logs = tmp_path_factory.mktemp("structured")
    with pair(tiny_llama_path, logs, args=ARGS) as servers:
        yield servers


def conforms(text: str) -> None:
    found = json.loads(text)
    assert set(found) == {"town", "sky", "wind"}
    assert len(found["town"]) <= 10 and found["sky"] in ("clear", "grey")
    assert 2 <= len(found["wind"]) <= 4 and set(found["wind"]) <= {1, 22, 333}


class Effect:
    """What requests did to vLLM's metrics."""

    def __init__(self, vllm: Vllm) -> None:
        self._vllm = vllm
        self._before = self._now()

    def _now(self) -> tuple[float, float, float]:
        metric = self._vllm.metric
        return (
            metric("vllm:mac_decode_tokens_total"),
            metric("vllm:mac_decode_local_total"),
            metric("vllm:mac_decode_fallbacks_total"),
        )

    def assert_handed_off(self, *answers: dict[str, Any]) -> None:
        """All tokens but the first of each answer were the receiver's."""
        tokens = [a["usage"]["completion_tokens"] for a in answers]
        assert all(count > 1 for count in tokens)
        wanted = sum(tokens) - len(tokens)
        until = time.monotonic() + 5
        while (now := self._now())[0] - self._before[0] < wanted and time.monotonic() < until:
            time.sleep(0.1)
        assert tuple(b - a for a, b in zip(self._before, now, strict=True)) == (wanted, 0, 0)


def complete(vllm: Vllm, **fields: Any) -> dict[str, Any]:
    return vllm.complete(PROMPT, 120, **fields)


def chat(vllm: Vllm, **fields: Any) -> dict[str, Any]:
    body = {"model": "m", "temperature": 0, "max_completion_tokens": 120,
            "messages": [{"role": "user", "content": "The weather in Rome?"}]} | fields  # fmt: skip
    answer = httpx.post(f"{vllm.url}/v1/chat/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


Check = Callable[[str], Any]
KINDS: dict[str, tuple[dict[str, Any], Check]] = {
    "JSON schema": ({"structured_outputs": {"json": SCHEMA}}, conforms),
    "response format": (
        {"response_format": {"type": "json_schema",
                             "json_schema": {"name": "s", "schema": SCHEMA}}}, conforms),
    "choice": ({"structured_outputs": {"choice": ["perhaps", "certainly", "né"]}},
               ["perhaps", "certainly", "né"].index),
    "regular expression": ({"structured_outputs": {"regex": "[a-c]{3}-[0-9]{2}"}},
                           lambda t: re.fullmatch("[a-c]{3}-[0-9]{2}", t)[0]),
    "EBNF": ({"structured_outputs": {"grammar": EBNF}},
             lambda t: re.fullmatch("go (up and )*(north|south)", t)[0]),
    "Lark": ({"structured_outputs": {"grammar": LARK}},
             lambda t: re.fullmatch("go (north|south)", t)[0]),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_the_receivers_and_valid(compact: tuple[Vllm, Receiver], kind: str) -> None:
    fields, check = KINDS[kind]
    for sampling in ({}, {"temperature": 1.0, "seed": 3}):
        effect = Effect(compact[0])
        answer = complete(compact[0], **fields, **sampling)
        (choice,) = answer["choices"]
        assert choice["finish_reason"] == "stop", choice
        check(choice["text"])
        effect.assert_handed_off(answer)


def test_a_json_object_of_any_kind(compact: tuple[Vllm, Receiver]) -> None:
    effect = Effect(compact[0])
    answer = chat(compact[0], response_format={"type": "json_object"}, logit_bias={"109": 30})
    text = answer["choices"][0]["message"]["content"]
    effect.assert_handed_off(answer)
    assert text.startswith("{")
    if answer["choices"][0]["finish_reason"] == "stop":
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    "choice", [{"type": "function", "function": {"name": "weather"}}, "required"], ids=str
)
def test_a_forced_tool(compact: tuple[Vllm, Receiver], choice: Any) -> None:
    effect = Effect(compact[0])
    fields = {"parallel_tool_calls": False} if choice == "required" else {}
    answer = chat(compact[0], tools=[TOOL], tool_choice=choice, **fields)
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"])["town"] in ("Rome", "Oslo")
    effect.assert_handed_off(answer)


def test_legacy_structural_tags(compact: tuple[Vllm, Receiver]) -> None:
    effect = Effect(compact[0])
    answer = chat(
        compact[0],
        max_completion_tokens=30,
        response_format={
            "type": "structural_tag",
            "structures": [{"begin": "<f=weather>", "schema": SCHEMA, "end": "</f>"}],
            "triggers": ["<f="],
        },
    )
    effect.assert_handed_off(answer)


def test_what_comes_after_an_end_that_is_ignored(compact: tuple[Vllm, Receiver]) -> None:
    effect = Effect(compact[0])
    answer = complete(compact[0], ignore_eos=True, structured_outputs={"choice": ["perhaps"]},
                      skip_special_tokens=False)  # fmt: skip
    assert answer["choices"][0]["text"].startswith("perhaps<|im_end|>")
    assert answer["usage"]["completion_tokens"] == 120
    effect.assert_handed_off(answer)


def test_texts_with_and_without_a_grammar_at_once(compact: tuple[Vllm, Receiver]) -> None:
    vllm, _ = compact
    prompts = [[30 + 7 * i + n for i in range(12 + n)] for n in range(6)]
    alone = [vllm.tokens(prompt, 40) for prompt in prompts]

    def ask(n: int) -> dict[str, Any]:
        if n % 2:
            return vllm.complete(prompts[n // 2], 40, ignore_eos=True)
        return complete(vllm, structured_outputs={"json": SCHEMA}, temperature=1, seed=n)

    effect = Effect(vllm)
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(12)))
    assert [a["choices"][0]["token_ids"] for a in answers[1::2]] == alone
    for answer in answers[::2]:
        conforms(answer["choices"][0]["text"])
    effect.assert_handed_off(*answers)


def test_a_grammar_that_the_receiver_refuses_is_decoded_by_vllm(
    compact: tuple[Vllm, Receiver],
) -> None:
    """It counts against nobody: the next requests are handed off."""
    vllm, _ = compact
    tag = json.dumps({"type": "structural_tag", "format": {"type": "any_text"}})
    tokens = vllm.metric("vllm:mac_decode_tokens_total")
    fallbacks = vllm.metric("vllm:mac_decode_fallbacks_total")
    for _ in range(4):
        answer = vllm.complete(PROMPT, 8, structured_outputs={"structural_tag": tag})
        assert answer["usage"]["completion_tokens"] == 8
    effect = Effect(vllm)
    effect.assert_handed_off(complete(vllm, structured_outputs={"choice": ["perhaps"]}))
    assert vllm.metric("vllm:mac_decode_fallbacks_total") == fallbacks + 4
    # What was handed off are the tokens of "perhaps" and the end, but for the first.
    assert vllm.metric("vllm:mac_decode_tokens_total") - tokens < 8
    assert "cannot decode request" in vllm.server.log.read_text()


def test_a_receiver_that_dies_in_the_middle(
    compact: tuple[Vllm, Receiver], tiny_llama_path: Path, tmp_path: Path
) -> None:
    """vLLM goes on where the text is in its grammar, not at its beginning."""
    vllm, receiver = compact
    long = {
        "type": "object",
        "properties": {
            f"entry{i}": {"type": "string", "minLength": 30, "maxLength": 60} for i in range(12)
        },
        "required": [f"entry{i}" for i in range(12)],
    }
    answers: list[dict[str, Any]] = []

    def ask() -> None:
        answers.append(vllm.complete(PROMPT, 1500, structured_outputs={"json": long}))

    tokens = vllm.metric("vllm:mac_decode_tokens_total")
    thread = threading.Thread(target=ask)
    thread.start()
    try:
        until = time.monotonic() + 60
        while receiver.metric("mlx_receiver_decoded_tokens_total") < 40 + tokens:
            assert time.monotonic() < until
            time.sleep(0.02)
    finally:
        receiver.server.signal(signal.SIGKILL)
        thread.join(120)
    again = start_receiver(tiny_llama_path, tmp_path / "receiver.log", port=receiver.port)
    try:
        (choice,) = answers[0]["choices"]
        assert choice["finish_reason"] == "stop"
        found = json.loads(choice["text"])
        assert set(found) == set(long["properties"])  # type: ignore[arg-type]
        assert all(30 <= len(value) <= 60 for value in found.values())
        assert vllm.metric("vllm:mac_decode_fallbacks_total", reason="lost") == 1
        theirs = vllm.metric("vllm:mac_decode_tokens_total") - tokens
        assert 10 < theirs < answers[0]["usage"]["completion_tokens"] - 10
    finally:
        again.server.stop()


# --- reasoning ----------------------------------------------------------------------------------

#: Special tokens of the test model's tokenizer take the part of ``<think>`` and ``</think>``.
PLUGIN = """
from vllm.reasoning import ReasoningParserManager
from vllm.reasoning.basic_parsers import BaseThinkingReasoningParser

@ReasoningParserManager.register_module("marks")
class Marks(BaseThinkingReasoningParser):
    start_token, end_token = "<file_sep>", "<filename>"
"""
#: What ends the reasoning when its budget is spent.
ENOUGH = " Enough of it.<filename>"
#: A request of which this is part is decoded by vLLM.
LOCALLY = {"vllm_xargs": {"anything": 1}}


@pytest.fixture(scope="module")
def reasoning(
    tiny_llama_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Vllm, Receiver]]:
    logs = tmp_path_factory.mktemp("reasoning")
    (logs / "marks.py").write_text(PLUGIN)
    args = (
        "--reasoning-parser", "marks", "--reasoning-parser-plugin", str(logs / "marks.py"),
        "--reasoning-config",
        json.dumps({"reasoning_start_str": "<file_sep>", "reasoning_end_str": ENOUGH}),
    )  # fmt: skip
    with pair(tiny_llama_path, logs, args=args) as servers:
        yield servers


def test_a_grammar_begins_behind_the_reasoning(
    reasoning: tuple[Vllm, Receiver], tiny_llama_path: Path
) -> None:
    vllm, _ = reasoning
    end = _id(tiny_llama_path, "<filename>")
    thought = 0
    for seed in range(8):
        effect = Effect(vllm)
        answer = complete(vllm, temperature=1, seed=seed, logit_bias={str(end): 14},
                          structured_outputs={"choice": ["perhaps", "certainly"]})  # fmt: skip
        (choice,) = answer["choices"]
        tokens = choice["token_ids"]
        effect.assert_handed_off(answer)
        if end in tokens:
            thought += tokens.index(end)
            assert re.search("(perhaps|certainly)$", choice["text"]), choice
            assert choice["finish_reason"] == "stop"
            assert len(tokens) - tokens.index(end) < 8
    assert thought > 8


def test_reasoning_that_has_ended_in_the_prompt(
    reasoning: tuple[Vllm, Receiver], tiny_llama_path: Path
) -> None:
    effect = Effect(reasoning[0])
    answer = reasoning[0].complete(
        [30, 40, 50, _id(tiny_llama_path, "<filename>"), 60], 40,
        structured_outputs={"choice": ["perhaps", "certainly"]},
    )  # fmt: skip
    assert answer["choices"][0]["text"] in ("perhaps", "certainly")
    effect.assert_handed_off(answer)


@pytest.mark.parametrize("budget", [0, 1, 7, 100])
def test_a_thinking_budget(
    reasoning: tuple[Vllm, Receiver], tiny_llama_path: Path, budget: int
) -> None:
    """In the prompt's reasoning, in one that the model begins or begins again, and without."""
    vllm, _ = reasoning
    start, enough = _id(tiny_llama_path, "<file_sep>"), _enough(vllm)
    prompts = [[30, 40, 50, start, *range(60, 64)], [30, 40, 50, start], [30, 40, 50]]
    asked = [
        dict(prompt=prompt, max_tokens=60, thinking_token_budget=budget, ignore_eos=True, **fields)
        for prompt in prompts
        for fields in ({}, {"logit_bias": {str(start): 5}, "repetition_penalty": 1.5})
    ]  # fmt: skip
    alone = [vllm.complete(**fields, **LOCALLY)["choices"][0]["token_ids"] for fields in asked]
    assert alone[2][budget : budget + len(enough)] == enough or budget > 60
    effect = Effect(vllm)
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda fields: vllm.complete(**fields), asked))
    assert [answer["choices"][0]["token_ids"] for answer in answers] == alone
    effect.assert_handed_off(*answers)


def test_a_grammar_behind_a_thinking_budget(
    reasoning: tuple[Vllm, Receiver], tiny_llama_path: Path
) -> None:
    vllm, _ = reasoning
    prompt = [30, 40, 50, _id(tiny_llama_path, "<file_sep>")]
    fields = {"structured_outputs": {"choice": ["perhaps", "certainly"]},
              "thinking_token_budget": 6}  # fmt: skip
    effect = Effect(vllm)
    answer = vllm.complete(prompt, 60, **fields)
    (choice,) = answer["choices"]
    assert choice["token_ids"][6:][: len(_enough(vllm))] == _enough(vllm)
    assert re.search("(perhaps|certainly)$", choice["text"]), choice
    effect.assert_handed_off(answer)


def test_a_receiver_that_dies_in_the_middle_of_a_thinking_budget(
    reasoning: tuple[Vllm, Receiver], tiny_llama_path: Path, tmp_path: Path
) -> None:
    """vLLM goes on with what is left of it."""
    vllm, receiver = reasoning
    prompt, enough = [30, 40, 50, _id(tiny_llama_path, "<file_sep>")], _enough(vllm)
    budget = {"thinking_token_budget": 700, "ignore_eos": True}
    alone = vllm.complete(prompt, 750, **budget, **LOCALLY)["choices"][0]["token_ids"]
    assert alone[700 : 700 + len(enough)] == enough
    tokens = vllm.metric("vllm:mac_decode_tokens_total")
    before = receiver.metric("mlx_receiver_decoded_tokens_total")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(vllm.complete, prompt, 750, **budget)
        try:
            until = time.monotonic() + 60
            while receiver.metric("mlx_receiver_decoded_tokens_total") < before + 40:
                assert time.monotonic() < until
                time.sleep(0.01)
        finally:
            receiver.server.signal(signal.SIGKILL)
        assert answer.result(120)["choices"][0]["token_ids"] == alone
    again = start_receiver(tiny_llama_path, tmp_path / "receiver.log", port=receiver.port)
    try:
        assert vllm.metric("vllm:mac_decode_fallbacks_total", reason="lost") == 1
        assert 10 < vllm.metric("vllm:mac_decode_tokens_total") - tokens < 700
    finally:
        again.server.stop()


def _enough(vllm: Vllm) -> list[int]:
    body = {"model": "m", "prompt": ENOUGH, "add_special_tokens": False}
    found: list[int] = httpx.post(f"{vllm.url}/tokenize", json=body).json()["tokens"]
    assert len(found) > 3
    return found


def _id(model: Path, token: str) -> int:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    return next(int(t["id"]) for t in tokenizer["added_tokens"] if t["content"] == token)
