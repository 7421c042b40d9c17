"""Structured output of the receiver's own API."""

from __future__ import annotations

import functools
import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from mlx_receiver.http.openai.tokenizer import Tokenizer
from mlx_receiver.receiver import Receiver
from tests.mlx_receiver.http.test_http import url

#: Of bounded length, so that the texts of a random model end.
PARAMETERS = {
    "type": "object",
    "properties": {"town": {"enum": ["Rome", "Oslo"]}},
    "required": ["town"],
}
REGEX = "[a-c]{3}-[0-9]{2}"
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": PARAMETERS}}
    for name in ("weather", "tides")
]
WEATHER = {"type": "function", "function": {"name": "weather"}}
MESSAGES = [{"role": "user", "content": "The weather?"}]


@functools.cache
def no_space(receiver: Receiver) -> dict[str, float]:
    """A bias against white space, of which a random model writes as much as it may."""
    tokenizer = Tokenizer(receiver.source)
    vocabulary = receiver.source.signature.vocab_size
    return {str(t): -100.0 for t in range(vocabulary) if not tokenizer.decode([t]).strip()}


@pytest.fixture(scope="module")
def client(receiver: Receiver) -> Any:
    with openai.OpenAI(base_url=url(receiver, "/v1"), api_key="none", max_retries=0) as made:
        yield made


def chat(receiver: Receiver, status: int = 200, **fields: Any) -> Any:
    body = {"messages": MESSAGES, "temperature": 0, "max_tokens": 90,
            "logit_bias": no_space(receiver)} | fields  # fmt: skip
    answer = httpx.post(url(receiver, "/v1/chat/completions"), json=body, timeout=60)
    assert answer.status_code == status, answer.text
    return answer.json()


FORMS: dict[str, dict[str, Any]] = {
    "schema": {"response_format": {"type": "json_schema",
                                   "json_schema": {"name": "s", "schema": PARAMETERS}}},
    "vLLM's schema": {"structured_outputs": {"json": PARAMETERS}},
    "vLLM's schema as text": {"structured_outputs": {"json": json.dumps(PARAMETERS)}},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_json_by_a_schema(receiver: Receiver, form: str) -> None:
    (choice,) = chat(receiver, **FORMS[form])["choices"]
    assert choice["finish_reason"] == "stop"
    assert json.loads(choice["message"]["content"])["town"] in ("Rome", "Oslo")


@pytest.mark.parametrize(
    ("given", "pattern"),
    [
        ({"regex": REGEX}, REGEX),
        ({"choice": ["perhaps", "né"]}, "perhaps|né"),
        ({"grammar": 'root ::= "go " ("north" | "south")\n'}, "go (north|south)"),
    ],
    ids=str,
)
def test_other_kinds(receiver: Receiver, given: Any, pattern: str) -> None:
    body = {"prompt": "The way: ", "max_tokens": 60, "n": 3, "temperature": 1.0,
            "structured_outputs": given}  # fmt: skip
    answer = httpx.post(url(receiver, "/v1/completions"), json=body, timeout=60)
    for choice in answer.json()["choices"]:
        assert choice["finish_reason"] == "stop"
        assert re.fullmatch(pattern, choice["text"]), choice


def test_any_object(receiver: Receiver) -> None:
    (choice,) = chat(receiver, response_format={"type": "json_object"}, max_tokens=8)["choices"]
    assert choice["message"]["content"].startswith("{")


def test_a_named_tool(receiver: Receiver) -> None:
    (choice,) = chat(receiver, tools=TOOLS, tool_choice=WEATHER)["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "stop" and choice["message"]["content"] is None
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"])["town"] in ("Rome", "Oslo")


def test_a_tool_that_is_required(receiver: Receiver) -> None:
    (choice,) = chat(
        receiver, tools=TOOLS, tool_choice="required", parallel_tool_calls=False
    )["choices"]  # fmt: skip
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] in ("weather", "tides")
    assert json.loads(call["function"]["arguments"])["town"] in ("Rome", "Oslo")


def test_a_required_call_that_is_cut_off_is_text(receiver: Receiver) -> None:
    (choice,) = chat(receiver, tools=TOOLS, tool_choice="required", max_tokens=5)["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"].startswith("[")


def test_the_openai_client_streams_a_forced_call(client: openai.OpenAI, receiver: Receiver) -> None:
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id, messages=MESSAGES, tools=TOOLS, stream=True,
        tool_choice=WEATHER, temperature=0, max_tokens=90, logit_bias=no_space(receiver),
    )  # type: ignore[call-overload]  # fmt: skip
    calls = [call for part in stream for call in part.choices[0].delta.tool_calls or ()]
    assert [call.function.name for call in calls] == ["weather"]
    assert json.loads(calls[0].function.arguments)["town"] in ("Rome", "Oslo")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tool_choice": "required"}, "tool_choice needs tools"),
        ({"tool_choice": WEATHER, "tools": TOOLS[1:]}, "'weather'"),
        ({"tool_choice": {"type": "function"}, "tools": TOOLS}, "name a function"),
        ({"response_format": {"type": "json_schema"}}, "has no schema"),
        ({"response_format": {"type": "json_schema", "json_schema":
          {"schema": {"type": "integer", "multipleOf": 99_999_999}}}}, "to compile"),
        ({"structured_outputs": {"choice": []}}, "no list of texts"),
        ({"structured_outputs": {"json_object": False}}, "true or left out"),
        ({"structured_outputs": {"grammar": " "}}, "no text, or an empty one"),
        ({"structured_outputs": {"regex": "a{"}, "stream": True}, "the grammar is refused"),
    ],
)  # fmt: skip
def test_what_cannot_be_constrained_is_said(
    receiver: Receiver, fields: dict[str, Any], said: str
) -> None:
    assert said in chat(receiver, 400, **fields)["error"]["message"]


def test_a_slow_grammar_holds_nobody_up(receiver: Receiver) -> None:
    """One that compiles for seconds, and texts without a grammar meanwhile."""
    slow = {"structured_outputs": {"json": {"type": "integer", "multipleOf": 99_999_989}}}
    with ThreadPoolExecutor(2) as pool:
        hostile = pool.submit(chat, receiver, 400, **slow)
        for _ in range(3):
            chat(receiver, max_tokens=8)
        assert not hostile.done()
        assert "simplify it" in hostile.result()["error"]["message"]
