"""``/v1/responses`` and ``/v1/messages`` of vLLM and of a receiver in front of it.

The model calls tools, so that every kind of item is in the answers. Each request goes to both
servers, and the fields of the answers are compared; the receiver has vLLM prefill long prompts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.callers import ANSWER
from tests.servers import Receiver, Vllm, metric, pair

pytestmark = pytest.mark.server

ARGS = (
    "--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--enable-prompt-tokens-details",
)  # fmt: skip
LONG = "Tell me more of it. " * 40

WEATHER = {"type": "object", "properties": {"days": {"type": "integer"}}}
FUNCTIONS = [
    {"type": "function", "name": "weather", "description": "Tells the weather.",
     "parameters": WEATHER, "strict": False},
    {"type": "function", "name": "clock", "parameters": {"type": "object"}},
]  # fmt: skip
TOOLS = [
    {"name": "weather", "description": "Tells the weather.", "input_schema": WEATHER},
    {"name": "clock", "input_schema": {"type": "object"}},
]

RESPONSES: dict[str, dict[str, Any]] = {
    "a text": {"input": "Hello"},
    "cut short": {"input": "Hello", "max_output_tokens": 3},
    "a long prompt": {"input": LONG, "instructions": "Be brief."},
    "every field": {
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "Hello"}]}],
        "instructions": "Be brief.", "metadata": {"a": "b"}, "user": "me", "store": True,
        "top_logprobs": 2, "include": ["message.output_text.logprobs"], "max_tool_calls": 3,
        "parallel_tool_calls": False, "presence_penalty": 0.1, "top_p": 0.9,
        "reasoning": {"effort": "low"}, "text": {"format": {"type": "text"}, "verbosity": "low"},
    },
    "tools": {"input": "How is it outside?", "tools": FUNCTIONS},
    "one call": {"input": "How?", "tools": FUNCTIONS, "parallel_tool_calls": False},
    "no tools wanted": {"input": "How?", "tools": FUNCTIONS, "tool_choice": "none"},
    "a second turn": {
        "tools": FUNCTIONS,
        "input": [
            {"role": "user", "content": "How is it outside?"},
            {"type": "reasoning", "id": "rs_1", "summary": [],
             "content": [{"type": "reasoning_text", "text": "Hm."}]},
            {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
             "content": [{"type": "output_text", "text": "I ask.", "annotations": []}]},
            {"type": "function_call", "call_id": "c1", "name": "weather",
             "arguments": "{\"days\": 7}"},
            {"type": "function_call", "call_id": "c2", "name": "clock", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "snow"},
            {"type": "function_call_output", "call_id": "c2", "output": "noon"},
        ],
    },
}  # fmt: skip
MESSAGES: dict[str, dict[str, Any]] = {
    "a text": {"messages": [{"role": "user", "content": "Hello"}]},
    "cut short": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3},
    "a long prompt": {
        "messages": [{"role": "user", "content": LONG}],
        "system": [{"type": "text", "text": "Be brief."}],
    },
    "a stop sequence": {
        "messages": [{"role": "user", "content": "Hello"}], "stop_sequences": ["snow"],
    },
    "tools": {"messages": [{"role": "user", "content": "How is it outside?"}], "tools": TOOLS},
    "one call": {
        "messages": [{"role": "user", "content": "How?"}], "tools": TOOLS,
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
    },
    "a second turn": {
        "tools": TOOLS,
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "How is"},
                                         {"type": "text", "text": "it outside?"}]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "s"},
                {"type": "text", "text": "I ask."},
                {"type": "tool_use", "id": "c1", "name": "weather", "input": {"days": 7}},
                {"type": "tool_use", "id": "c2", "name": "clock", "input": {}},
            ]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": "snow"},
                {"type": "tool_result", "tool_use_id": "c2",
                 "content": [{"type": "text", "text": "noon"}]},
            ]},
        ],
    },
}  # fmt: skip

CASES = {"responses": RESPONSES, "messages": MESSAGES}
LIMITS = {"responses": "max_output_tokens", "messages": "max_tokens"}

#: Not compared: what is new in every answer, what depends on a prefix cache, and what only one of
#: them has (the bytes of a token in a stream, vLLM's blocks that were cached).
NEW = frozenset(
    {"id", "item_id", "call_id", "created_at", "sequence_number", "model"}
    | {"cached_tokens", "cache_write_tokens", "cache_read_input_tokens", "input_tokens"}
    | {"cache_creation_input_tokens", "bytes"}
)
#: vLLM guides the text where there may be one call: more tokens for the same call.
GUIDED = frozenset({"output_tokens", "total_tokens"})


@pytest.fixture(scope="module")
def both(
    calling_llama_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Vllm, Receiver]]:
    """vLLM, and a receiver that it hands off to and that has it prefill."""
    logs, long = tmp_path_factory.mktemp("agents"), ("--prefill-min-tokens", "64")
    with pair(calling_llama_path, logs, args=ARGS, receiver_args=long, front_door=True) as servers:
        yield servers


def ask(base: str, path: str, **fields: Any) -> Any:
    """The answer, or a stream's events with their deltas joined."""
    body = {"temperature": 0} | fields
    answer = httpx.post(f"{base}/v1/{path}", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    if not fields.get("stream"):
        return answer.json()
    found: list[Any] = []
    named = ""
    for line in answer.text.splitlines():
        if line.startswith("event: "):
            named = line[7:]
        elif line.startswith("data: "):
            event = json.loads(line[6:])
            assert event["type"] == named
            previous = found[-1] if found else {"type": ""}
            if "delta" in event and previous["type"] == named != "message_delta":
                previous["delta"] = joined(previous["delta"], event["delta"])
                previous["logprobs"] = [*previous.get("logprobs", []), *event.get("logprobs", [])]
            else:
                found.append(event)
    return found


def joined(first: Any, second: Any) -> Any:
    if isinstance(first, str):
        return first + second
    return {key: value if key == "type" else value + second[key] for key, value in first.items()}


def plain(value: Any, without: frozenset[str]) -> Any:
    """Without some fields, with what is null or empty left out, and with JSON in a text read."""
    if isinstance(value, dict):
        items = {key: plain(item, without) for key, item in value.items() if key not in without}
        return {key: item for key, item in items.items() if item not in (None, [], {})}
    if isinstance(value, list):
        return [plain(item, without) for item in value]
    if isinstance(value, str) and value.startswith('{"'):
        return json.loads(value)
    return round(value, 2) if isinstance(value, float) else value


def compare(mine: Any, theirs: Any, name: str) -> None:
    """Every field that both have to have."""
    without = NEW | (GUIDED if name == "one call" else frozenset())
    if isinstance(mine, list):
        # vLLM sends no pings, and its last event is always the same.
        mine = [event for event in mine if event["type"] != "ping"]
        for event in mine:
            if event["type"] == "response.incomplete":
                event["type"] = "response.completed"
        # In a stream it leaves out the end's log-probability.
        without |= {"logprobs"}
    assert plain(mine, without) == plain(theirs, without)


def remote(receiver: Receiver) -> float:
    """Samples that vLLM has prefilled."""
    return metric(receiver.url, "mlx_receiver_frontdoor_requests_total", path="remote")


@pytest.mark.parametrize(
    ("path", "name"),
    [*(("responses", name) for name in RESPONSES), *(("messages", name) for name in MESSAGES)],
)
@pytest.mark.parametrize("stream", [False, True])
def test_the_fields_are_vllms(
    both: tuple[Vllm, Receiver], path: str, name: str, stream: bool
) -> None:
    vllm, receiver = both
    fields = {LIMITS[path]: 60, "stream": stream} | CASES[path][name]
    theirs = ask(vllm.url, path, model="m", **fields)
    compare(ask(receiver.url, path, **fields), theirs, name)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["responses", "messages"])
def test_vllm_prefills_and_the_receiver_decodes(
    both: tuple[Vllm, Receiver], path: str, stream: bool
) -> None:
    receiver = both[1]
    fields = CASES[path]["a long prompt"] | {LIMITS[path]: 60, "stream": stream}
    before = remote(receiver), receiver.metric("mlx_receiver_decoded_tokens_total")
    answer = ask(receiver.url, path, **fields)
    assert ANSWER in json.dumps(answer)
    assert remote(receiver) == before[0] + 1
    last = answer[-2 if path == "messages" else -1] if stream else answer
    produced = (last.get("usage") or last["response"]["usage"])["output_tokens"]
    # The first token is vLLM's.
    decoded = receiver.metric("mlx_receiver_decoded_tokens_total") - before[1]
    assert decoded == produced - 1


@pytest.mark.parametrize("path", ["responses", "messages"])
def test_prompts_are_as_long_as_vllms(both: tuple[Vllm, Receiver], path: str) -> None:
    vllm, receiver = both
    for name, fields in CASES[path].items():
        fields = fields | {LIMITS[path]: 2}
        theirs = ask(vllm.url, path, model="m", **fields)["usage"]
        mine = ask(receiver.url, path, **fields)["usage"]
        assert prompt_tokens(mine) == prompt_tokens(theirs), name


def prompt_tokens(usage: dict[str, Any]) -> int:
    """Anthropic counts those in a prefix cache apart."""
    names = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
    return sum(usage.get(name, 0) for name in names)
