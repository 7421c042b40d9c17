"""Anthropic's Messages API, as its own client uses it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest

from mlx_receiver.receiver import Receiver
from mlx_receiver.settings import Settings
from tests.callers import ANSWER, CALLED, SAYS
from tests.mlx_receiver.client import HERE, started
from tests.mlx_receiver.http.test_http import url
from tests.waiting import eventually

TOOLS: Any = [
    {"name": name, "description": f"Tell the {name}.", "input_schema": {"type": "object"}}
    for name in ("weather", "clock")
]
HELLO: Any = [{"role": "user", "content": "Hello"}]
#: Its newer models take no temperature, so the client has none.
GREEDY: Any = {"extra_body": {"ignore_eos": True, "temperature": 0}}


@pytest.fixture(scope="module")
def base(receiver: Receiver) -> str:
    return url(receiver, "")


@pytest.fixture(scope="module")
def client(base: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=base, api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def model(base: str) -> str:
    return httpx.get(f"{base}/v1/models").json()["data"][0]["id"]


@pytest.fixture(scope="module")
def caller(calling_llama_path: Path) -> Iterator[anthropic.Anthropic]:
    """A client of a receiver whose model calls tools."""
    with started(calling_llama_path, http_port=0) as receiver:
        with anthropic.Anthropic(base_url=url(receiver, ""), api_key="none", max_retries=0) as made:
            yield made


def post(base: str, status: int = 200, path: str = "", **fields: Any) -> Any:
    body = {"messages": HELLO, "max_tokens": 4, "temperature": 0} | fields
    answer = httpx.post(f"{base}/v1/messages{path}", json=body, timeout=60)
    assert answer.status_code == status, answer.text
    return answer.json()


def chat(base: str, **fields: Any) -> Any:
    body = {"messages": HELLO, "max_tokens": 4, "temperature": 0} | fields
    answer = httpx.post(f"{base}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_text_is_that_of_a_chat(base: str, client: anthropic.Anthropic, model: str) -> None:
    said: Any = [{"role": "user", "content": "What is a harbour?"}]
    expected = chat(
        base, messages=[{"role": "system", "content": "Be brief."}, *said], max_tokens=12,
        ignore_eos=True,
    )  # fmt: skip
    systems: list[Any] = ["Be brief.", [{"type": "text", "text": "Be "},
                                        {"type": "text", "text": "brief."}]]  # fmt: skip
    for system in systems:
        answer = client.messages.create(
            model=model, system=system, messages=said, max_tokens=12, **GREEDY
        )
        (block,) = answer.content
        assert block.type == "text"
        assert block.text == expected["choices"][0]["message"]["content"]
        assert (answer.stop_reason, answer.stop_sequence) == ("max_tokens", None)
        assert answer.usage.input_tokens == expected["usage"]["prompt_tokens"]
        assert (answer.usage.output_tokens, answer.usage.cache_read_input_tokens) == (12, 0)
        counted = client.messages.count_tokens(model=model, system=system, messages=said)
        assert counted.input_tokens == answer.usage.input_tokens


def test_the_events_of_a_stream(client: anthropic.Anthropic, model: str) -> None:
    asked: Any = {"model": model, "messages": HELLO, "max_tokens": 8, **GREEDY}
    whole = client.messages.create(**asked)
    events = list(client.messages.create(**asked, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"], "the client hides pings"
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    with client.messages.stream(**asked) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert [block.text for block in whole.content if block.type == "text"] == [text]
    new = {"id": "", "stop_details": None}  # the latter is the client's own
    assert final.to_dict() | new == whole.to_dict() | new


def test_the_lines_of_a_stream(base: str) -> None:
    body = {"messages": HELLO, "max_tokens": 2, "stream": True}
    lines = httpx.post(f"{base}/v1/messages", json=body, timeout=60).text.splitlines()
    names = [line[7:] for line in lines if line.startswith("event: ")]
    data = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    assert names == [event["type"] for event in data]
    assert names[:2] == ["message_start", "ping"] and names[-1] == "message_stop"
    assert len(lines) == 3 * len(names), "nothing but events"


@pytest.mark.parametrize("streamed", [False, True])
def test_stop_sequences(client: anthropic.Anthropic, model: str, streamed: bool) -> None:
    def ask(**fields: Any) -> Any:
        asked: Any = {"model": model, "messages": HELLO, "max_tokens": 12, **GREEDY, **fields}
        if not streamed:
            return client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            return stream.get_final_message()

    text = ask().content[0].text
    stop = text[9:14]
    answer = ask(stop_sequences=["never said", stop])
    assert answer.content[0].text == text[: text.index(stop)]
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)


@pytest.mark.parametrize("streamed", [False, True])
def test_tools_over_several_turns(caller: anthropic.Anthropic, streamed: bool) -> None:
    def ask(**fields: Any) -> Any:
        asked: Any = {"model": "", "messages": said, "tools": TOOLS, "max_tokens": 200,
                      "extra_body": {"temperature": 0}, **fields}  # fmt: skip
        if not streamed:
            return caller.messages.create(**asked)
        with caller.messages.stream(**asked) as stream:
            return stream.get_final_message()

    said: list[Any] = [{"role": "user", "content": "How is it outside?"}]
    first = ask()
    text, *calls = first.content
    assert (text.text, first.stop_reason) == (SAYS, "tool_use")
    assert [(call.name, call.input) for call in calls] == CALLED
    one: Any = {"type": "auto", "disable_parallel_tool_use": True}
    assert len(ask(tool_choice=one).content) == 2
    said.append({"role": "assistant", "content": [block.to_dict() for block in first.content]})
    results = [
        {"type": "tool_result", "tool_use_id": calls[0].id, "content": "snow"},
        {"type": "tool_result", "tool_use_id": calls[1].id,
         "content": [{"type": "text", "text": "noon"}], "is_error": False},
    ]  # fmt: skip
    said.append({"role": "user", "content": results})
    last = ask()
    assert (last.content[0].text, last.stop_reason) == (ANSWER, "end_turn")
    assert last.usage.input_tokens > first.usage.input_tokens
    counted = caller.messages.count_tokens(model="", messages=said, tools=TOOLS)
    assert counted.input_tokens == last.usage.input_tokens
    # Without the tools markers are text, as in chats.
    said = said[:1]
    none: Any = {"type": "none"}
    assert "<tool_call>" in ask(tool_choice=none).content[0].text


def test_an_answer_that_the_client_begins_is_continued(base: str) -> None:
    said = [*HELLO, {"role": "assistant", "content": "Well, "}]
    more = chat(base, messages=said, continue_final_message=True, add_generation_prompt=False)
    answer = post(base, messages=said)
    assert answer["content"][0]["text"] == more["choices"][0]["message"]["content"]


def test_what_agents_send_besides_is_accepted(base: str) -> None:
    post(
        base, metadata={"user_id": "me"}, thinking={"type": "adaptive"}, path="?beta=true",
        output_config={"effort": "low"}, service_tier="auto",
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
    )  # fmt: skip


def test_templates_hear_of_the_effort(caller: anthropic.Anthropic) -> None:
    def ask(path: str, **fields: Any) -> int:
        body = {"temperature": 0, "max_tokens": 1, "max_output_tokens": 1} | fields
        answer = httpx.post(
            f"{str(caller.base_url).rstrip(chr(47))}/v1/{path}", json=body, timeout=60
        )
        assert answer.status_code == 200, answer.text
        usage = answer.json()["usage"]
        return usage.get("input_tokens") or usage["prompt_tokens"]

    low = {"effort": "low"}
    plain = ask("messages", messages=HELLO)
    assert plain < ask("messages", messages=HELLO, thinking={"type": "disabled"})
    counts = {
        ask("messages", messages=HELLO, output_config=low),
        ask("responses", input="Hello", reasoning=low),
        ask("chat/completions", messages=HELLO, reasoning_effort="low"),
    }
    assert len(counts) == 1
    assert min(counts) > ask("chat/completions", messages=HELLO, reasoning_effort="none") > plain


def test_system_messages_between_others(base: str) -> None:
    """They stay where they are if the template takes them; a hash of the request is left out."""
    said = [*HELLO, {"role": "system", "content": "Be brief."}, *HELLO]
    billing = {"type": "text", "text": "x-anthropic-billing-header: cch=1;"}
    answer = post(base, messages=said, system=[billing])
    expected = chat(base, messages=said)
    assert answer["usage"]["input_tokens"] == expected["usage"]["prompt_tokens"]
    assert answer["content"][0]["text"] == expected["choices"][0]["message"]["content"]


IMAGE = {"type": "image", "source": {"type": "url", "url": "x"}}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0]: images"),
        (
            {"messages": [{"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "a", "content": [IMAGE]}]}]},
            "messages[0].content[0].content[0]: images",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "'video'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "$.messages[0].role"),
        ({"messages": []}, "messages is empty"),
        ({"max_tokens": 0}, "$.max_tokens"),
        ({"max_tokens": None}, "$.max_tokens"),
        ({"temperature": 3}, "$.temperature"),
        ({"stop_sequences": ["a"] * 5}, "$.stop_sequences"),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "thinking.budget_tokens"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
        ({"tools": [{"name": "f"}]}, "tools[0] has no input_schema"),
        ({"tools": [{**TOOLS[0], "defer_loading": True}]}, "defer_loading"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "needs a name"),
        ({"mcp_servers": [{"name": "a"}]}, "mcp_servers"),
        ({"context_management": {"edits": [{"type": "clear"}]}}, "context_management"),
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, "a prompt of 9031 tokens"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said(base: str, fields: dict[str, Any], said: str) -> None:
    answer = post(base, 400, **fields)
    assert answer["type"] == "error"
    assert answer["error"]["type"] == "invalid_request_error"
    assert said in answer["error"]["message"]


def test_errors_have_anthropics_shape(client: anthropic.Anthropic, base: str) -> None:
    with pytest.raises(anthropic.NotFoundError, match="is not served here"):
        client.messages.create(model="another", messages=HELLO, max_tokens=1)
    with pytest.raises(anthropic.NotFoundError, match="is not served here"):
        client.messages.count_tokens(model="another", messages=HELLO)
    large = {"messages": [{"role": "user", "content": "x" * (2 << 20)}], "max_tokens": 1}
    answers = [
        httpx.post(f"{base}/v1/messages", json=large),
        httpx.post(f"{base}/v1/messages", json={}, headers={"Origin": "http://evil.example"}),
        httpx.post(f"{base}/v1/messages", content=b"{}"),
        httpx.post(f"{base}/v1/messages", json=[]),
        httpx.get(f"{base}/v1/messages"),
        httpx.post(f"{base}/v1/messages/batches", json={}),
    ]  # fmt: skip
    found = [(answer.status_code, answer.json()["error"]["type"]) for answer in answers]
    assert found == [
        (413, "request_too_large"),
        (403, "permission_error"),
        (415, "invalid_request_error"),
        (400, "invalid_request_error"),
        (405, "invalid_request_error"),
        (404, "not_found_error"),
    ]


def test_the_api_key_of_either_client(tiny_llama_path: Path) -> None:
    settings = Settings(
        model=str(tiny_llama_path), **HERE, port=0, http_port=0, api_key="sesame",
        served_model_name="tiny",
    )  # fmt: skip
    with Receiver(settings) as receiver:
        base = url(receiver, "")
        for right in ({"api_key": "sesame"}, {"auth_token": "sesame"}):
            with anthropic.Anthropic(base_url=base, max_retries=0, **right) as client:
                client.messages.create(model="tiny", messages=HELLO, max_tokens=1)
        both = {"x-api-key": "another's", "Authorization": "Bearer sesame"}
        assert httpx.get(f"{base}/v1/models", headers=both).status_code == 200
        with anthropic.Anthropic(base_url=base, api_key="sesam", max_retries=0) as client:
            with pytest.raises(anthropic.AuthenticationError, match="x-api-key"):
                client.messages.create(model="tiny", messages=HELLO, max_tokens=1)
        wrong = {"x-api-key": "wrong"}
        with httpx.Client(headers=wrong, timeout=60) as client:
            tries = [client.get(f"{base}/v1/models").status_code for _ in range(100)]
        assert tries[0] == 401 and 429 in tries


def test_a_client_that_goes_away_stops_the_decoding(base: str, receiver: Receiver) -> None:
    body = {"messages": HELLO, "max_tokens": 8000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{base}/v1/messages", json=body, timeout=60) as answer:
        assert next(answer.iter_lines()) == "event: message_start"
        assert eventually(lambda: receiver.engine.decoding == 1)
    assert eventually(lambda: not receiver.engine.decoding)
