"""OpenAI's Responses API, as its own client uses it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from mlx_receiver.receiver import Receiver
from tests.callers import ANSWER, CALLED, SAYS
from tests.mlx_receiver.client import started
from tests.mlx_receiver.http.test_http import url
from tests.waiting import eventually

#: Not the same in two answers.
NEW = frozenset({"id", "item_id", "call_id", "created_at", "sequence_number"})
TOOLS: Any = [
    {"type": "function", "name": name, "description": f"Tell the {name}.",
     "parameters": {"type": "object", "properties": {}}}
    for name in ("weather", "clock")
]  # fmt: skip
GREEDY: Any = {"temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def base(receiver: Receiver) -> str:
    return url(receiver, "/v1")


@pytest.fixture(scope="module")
def client(base: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=base, api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


@pytest.fixture(scope="module")
def caller(calling_llama_path: Path) -> Iterator[openai.OpenAI]:
    """A client of a receiver whose model calls tools."""
    with started(calling_llama_path, http_port=0) as receiver:
        with openai.OpenAI(base_url=url(receiver, "/v1"), api_key="none", max_retries=0) as made:
            yield made


def same(value: Any) -> Any:
    """Without what is new in every answer."""
    if isinstance(value, dict):
        return {key: same(item) for key, item in value.items() if key not in NEW}
    return [same(item) for item in value] if isinstance(value, list) else value


def post(base: str, status: int = 200, **fields: Any) -> Any:
    body = {"input": "Hello", "max_output_tokens": 4, "temperature": 0} | fields
    answer = httpx.post(f"{base}/responses", json=body, timeout=60)
    assert answer.status_code == status, answer.text
    return answer.json()


def test_the_text_is_that_of_a_chat(client: openai.OpenAI, model: str) -> None:
    said: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is a harbour?"},
    ]
    chat = client.chat.completions.create(
        model=model, messages=said, max_completion_tokens=12, **GREEDY
    )
    answer = client.responses.create(
        model=model, instructions="Be brief.", input="What is a harbour?", max_output_tokens=12,
        metadata={"a": "b"}, store=True, **GREEDY,
    )  # fmt: skip
    assert answer.output_text == chat.choices[0].message.content
    assert (answer.status, answer.metadata) == ("incomplete", {"a": "b"})
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage is not None and chat.usage is not None
    assert answer.usage.input_tokens == chat.usage.prompt_tokens
    assert answer.usage.output_tokens == 12
    items: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "What is a harbour?"}]},
    ]
    again = client.responses.create(
        model=model, instructions="Be brief.", input=items, max_output_tokens=12, **GREEDY
    )
    assert again.output_text == answer.output_text


def test_the_events_of_a_stream(client: openai.OpenAI, model: str) -> None:
    asked: Any = {"model": model, "input": "Hello", "max_output_tokens": 8, **GREEDY}
    whole = client.responses.create(**asked)
    events = list(client.responses.create(**asked, stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == [
        "output_text.done", "content_part.done", "output_item.done", "incomplete"
    ]  # fmt: skip
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text
    last: Any = events[-1]
    assert same(last.response.to_dict()) == same(whole.to_dict())
    first: Any = events[0]
    assert first.response.status == "in_progress" and first.response.output == []


def test_a_stop_string_completes(base: str) -> None:
    text = post(base, max_output_tokens=12, ignore_eos=True)["output"][0]["content"][0]["text"]
    stop = text[9:14]
    answer = post(base, max_output_tokens=12, ignore_eos=True, stop=stop)
    assert answer["status"] == "completed" and answer["incomplete_details"] is None
    assert answer["output"][0]["content"][0]["text"] == text[: text.index(stop)]


def test_log_probabilities_are_those_of_a_chat(client: openai.OpenAI, model: str) -> None:
    chat = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Hello"}], max_completion_tokens=5,
        logprobs=True, top_logprobs=2, **GREEDY,
    )  # fmt: skip
    asked: Any = {
        "model": model, "input": "Hello", "max_output_tokens": 5, "top_logprobs": 2,
        "include": ["message.output_text.logprobs"], **GREEDY,
    }  # fmt: skip
    whole = client.responses.create(**asked)
    content: Any = whole.output[0]
    expected = chat.choices[0].logprobs
    assert expected is not None and expected.content is not None
    assert [token.to_dict() for token in content.content[0].logprobs] == [
        token.to_dict() for token in expected.content
    ]
    deltas = [
        event for event in client.responses.create(**asked, stream=True)
        if event.type == "response.output_text.delta"
    ]  # fmt: skip
    named = [token.token for event in deltas for token in event.logprobs]
    assert named == [token.token for token in expected.content]


@pytest.mark.parametrize("streamed", [False, True])
def test_tools_over_several_turns(caller: openai.OpenAI, streamed: bool) -> None:
    def ask(**fields: Any) -> Any:
        asked: Any = {"model": "", "input": said, "tools": TOOLS, "temperature": 0, **fields}
        if not streamed:
            return caller.responses.create(**asked)
        with caller.responses.stream(**asked) as events:
            for event in events:
                kinds.append(event.type)
            return events.get_final_response()

    kinds: list[str] = []
    said: list[Any] = [{"role": "user", "content": "How is it outside?"}]
    first = ask()
    assert [item.type for item in first.output] == ["message", "function_call", "function_call"]
    message, *calls = first.output
    assert message.content[0].text == SAYS
    assert [(call.name, json.loads(call.arguments)) for call in calls] == CALLED
    assert first.status == "completed" and first.tool_choice == "auto"
    if streamed:
        call = ["output_item.added", "function_call_arguments.delta",
                "function_call_arguments.done", "output_item.done"]  # fmt: skip
        found = [kind.removeprefix("response.") for kind in kinds]
        assert found[-9:] == [*call, *call, "completed"]
    assert len(ask(parallel_tool_calls=False).output) == 2
    said += [item.to_dict() for item in first.output]
    said += [
        {"type": "function_call_output", "call_id": call.call_id, "output": "snow"}
        for call in calls
    ]
    last = ask()
    assert (last.output_text, len(last.output)) == (ANSWER, 1)
    assert last.usage.input_tokens > first.usage.input_tokens
    # Without the tools markers are text, as in chats.
    said = said[:1]
    assert "<tool_call>" in ask(tool_choice="none").output_text


def test_a_chat_may_make_one_call_only(caller: openai.OpenAI) -> None:
    functions: Any = [
        {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}
        for tool in TOOLS
    ]
    for parallel, count in ((True, 2), (False, 1)):
        asked: Any = {
            "model": "",
            "messages": [{"role": "user", "content": "How?"}],
            "tools": functions,
            "parallel_tool_calls": parallel,
            "temperature": 0,
        }
        answer = caller.chat.completions.create(**asked)
        assert len(answer.choices[0].message.tool_calls or []) == count
        parts = list(caller.chat.completions.create(**asked, stream=True))
        calls = [call for part in parts for call in part.choices[0].delta.tool_calls or []]
        assert len(calls) == count
        assert parts[-1].choices[0].finish_reason == "tool_calls"


def test_an_unfinished_answer_is_continued(base: str) -> None:
    """As vLLM does it: with a message that is incomplete or in progress."""
    said: list[Any] = [{"role": "user", "content": "Hello"}]
    begun = {"type": "message", "role": "assistant", "status": "incomplete", "content": "Well, "}
    more = post(base, input=[*said, begun])
    chat = httpx.post(
        f"{base}/chat/completions",
        json={
            "messages": [*said, {"role": "assistant", "content": "Well, "}], "temperature": 0,
            "max_tokens": 4, "continue_final_message": True, "add_generation_prompt": False,
        },
    ).json()  # fmt: skip
    assert more["output"][0]["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert more["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools", "tools[0] is of type 'web_search'"),
        ({"tools": [{"type": "function"}]}, "tools", "`name`"),
        ({"tools": [{**TOOLS[0], "defer_loading": True}]}, "tools", "defer_loading"),
        ({"tools": TOOLS, "tool_choice": {"type": "mcp"}}, "tool_choice", "'mcp'"),
        ({"tools": TOOLS, "tool_choice": "perhaps"}, "tool_choice", "tool_choice"),
        ({"background": True}, "background", "background"),
        ({"conversation": "conv_1"}, "conversation", "conversation"),
        ({"truncation": "auto"}, "truncation", "truncation"),
        ({"prompt": {"id": "p"}}, "prompt", "prompt"),
        ({"enable_response_messages": True}, "enable_response_messages", "enable_response"),
        ({"include": ["everything"]}, "include", "$.include"),
        ({"temperature": 3}, "temperature", "`$.temperature`"),
        ({"max_output_tokens": 0}, "max_output_tokens", "`$.max_output_tokens`"),
        ({"top_logprobs": 21}, "top_logprobs", "`$.top_logprobs`"),
        ({"input": []}, "input", "input is empty"),
        ({"input": 3}, "input", "`$.input`"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input", "'item_reference'"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input", "input[0]: "),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input",
            "input[0].content[0] is of type 'input_image'",
        ),
        (
            {"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "{"}]},
            "input",
            "arguments are JSON",
        ),
        (
            {"input": [{"type": "function_call", "call_id": "a", "name": "f",
                        "arguments": "[" * 100_000}]},
            "input",
            "arguments are JSON",
        ),
        ({"input": [{"type": "reasoning", "encrypted_content": "x"}]}, "input", "encrypted"),
        ({"input": "word " * 9000}, "prompt", "a prompt of 9031 tokens"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said(
    base: str, fields: dict[str, Any], param: str, said: str
) -> None:
    error = post(base, 400, **fields)["error"]
    assert said in error["message"] and error["param"] == param
    assert (error["type"], error["code"]) == ("BadRequestError", 400)


def test_nothing_is_kept(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError, match="'resp_1' not found"):
        client.responses.create(model=model, input="x", previous_response_id="resp_1")
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_1")


def test_what_agents_send_besides_is_accepted(base: str) -> None:
    answer = post(
        base, store=False, include=["reasoning.encrypted_content"], user="me",
        prompt_cache_key="k",
        reasoning={"effort": "low", "summary": "auto"}, text={"verbosity": "low"},
        service_tier="auto", stream_options={"include_obfuscation": False},
        parallel_tool_calls=True,
        input=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": "Hello"},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": None},
        ],
    )  # fmt: skip
    assert answer["reasoning"]["effort"] == "low" and answer["user"] == "me"


def test_a_client_that_goes_away_stops_the_decoding(base: str, receiver: Receiver) -> None:
    body = {"input": "Hello", "max_output_tokens": 8000, "ignore_eos": True}
    with httpx.stream(
        "POST", f"{base}/responses", json={**body, "stream": True}, timeout=60
    ) as answer:
        lines = answer.iter_lines()
        assert next(lines) == "event: response.created"
        assert eventually(lambda: receiver.engine.decoding == 1)
    assert eventually(lambda: not receiver.engine.decoding)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{base}/responses", json=body, timeout=1)
    assert eventually(lambda: not receiver.engine.decoding)
