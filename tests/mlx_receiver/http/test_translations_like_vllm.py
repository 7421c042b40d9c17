"""Responses and Messages requests become the chats that vLLM makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_receiver.decode.model import find_model
from mlx_receiver.decode.sampling import check_sampling
from mlx_receiver.http.anthropic import bodies as anthropic_bodies
from mlx_receiver.http.anthropic import chats as anthropic_chats
from mlx_receiver.http.errors import ApiError
from mlx_receiver.http.openai.bodies import ChatBody
from mlx_receiver.http.openai.chat import _message
from mlx_receiver.http.openai.parameters import Defaults, sampling
from mlx_receiver.http.openai.tokenizer import Tokenizer
from mlx_receiver.http.responses import bodies as responses_bodies
from mlx_receiver.http.responses import chats as responses_chats
from mlx_receiver.wire.messages import WireError
from mlx_receiver.wire.ranges import MAX_LOGPROBS
from tests.mlx_receiver.http.test_api_like_vllm import VALUES

pytest.importorskip("vllm")

VOCABULARY = 49_152
USER = {"role": "user", "content": "How is it?"}
CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "snow"}
FUNCTION = {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}}


def said(*texts: str, **fields: Any) -> dict[str, Any]:
    """An assistant's message as the API itself writes it."""
    content = [{"type": "output_text", "text": text, "annotations": []} for text in texts]
    return {"type": "message", "role": "assistant", "content": content} | fields


def thought(text: str, **fields: Any) -> dict[str, Any]:
    content = [{"type": "reasoning_text", "text": text}]
    return {"type": "reasoning", "summary": [], "content": content} | fields


INPUTS: list[Any] = [
    "How is it?",
    "",
    [USER],
    [{"type": "message", **USER}],
    [{"role": "user", "content": [{"type": "input_text", "text": t} for t in ("How", "is it?")]}],
    [{"role": "system", "content": "Be brief."}, {"role": "developer", "content": "Be."}, USER],
    [USER, said("I ask.", id="msg_1", status="completed"), USER],
    [USER, {"role": "assistant", "content": "I ask."}, {"role": "assistant", "content": "So?"}],
    [USER, CALL, RESULT],
    [USER, said("I ask."), CALL, {**CALL, "call_id": "c2"}, RESULT, {**RESULT, "call_id": "c2"}],
    [USER, CALL, said("Wait."), RESULT],
    [USER, thought("Hm."), said("I ask."), CALL, RESULT, thought("So."), said("Snow."), USER],
    [USER, thought("Hm."), thought("Hm again."), CALL, RESULT],
    [USER, thought("", content=None, summary=[{"type": "summary_text", "text": "Hm."}]), CALL],
    [USER, CALL, {**RESULT, "output": [{"type": "input_text", "text": "snow"}]}],
    [USER, said("Well, ", status="incomplete")],
    [USER, {"role": "assistant", "content": "Well, ", "status": "in_progress"}],
]  # fmt: skip


def normal(message: Any) -> Any:
    """A message as the template sees it."""
    found = _message({key: value for key, value in message.items() if value is not None})
    for key in ("reasoning_content", "status", "type", "id"):
        found.pop(key, None)
    return found


def responses_chat(**fields: Any) -> ChatBody:
    body = responses_bodies.parse(json.dumps(fields).encode(), VOCABULARY)
    return responses_chats.chat(body, responses_chats.function_tools(body))


@pytest.mark.parametrize("given", INPUTS, ids=range(len(INPUTS)))
@pytest.mark.parametrize("instructions", [None, "Be brief."])
def test_input_items(given: Any, instructions: str | None) -> None:
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.openai.responses.utils import (
        construct_input_messages,
        should_continue_final_message,
    )

    request = ResponsesRequest.model_validate({"input": json.loads(json.dumps(given))})
    theirs = construct_input_messages(
        request_instructions=instructions, request_input=request.input
    )
    mine = responses_chat(input=given, instructions=instructions)
    assert list(map(normal, mine.messages)) == list(map(normal, theirs))
    assert mine.continue_final_message == should_continue_final_message(request.input)


@pytest.mark.parametrize("strict", [{}, {"strict": True}, {"strict": None}])
def test_function_tools(strict: dict[str, Any]) -> None:
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.openai.responses.utils import construct_tool_dicts

    tools = [FUNCTION | strict, {"type": "function", "name": "g", "parameters": None} | strict]
    request = ResponsesRequest.model_validate({"input": "x", "tools": tools})
    theirs = construct_tool_dicts(request.tools, "auto")
    # The text of the prompt follows from the order, too.
    assert json.dumps(responses_chat(input="x", tools=tools).tools) == json.dumps(theirs)


def test_what_the_text_must_look_like_goes_chats_way() -> None:
    """A chat's errors name the fields that the client knows."""
    schema = {"type": "object"}
    form = {"type": "json_schema", "name": "n", "schema": schema, "strict": True}
    for given in (form, {"type": "json_object"}):
        try:
            chat = responses_chat(input="x", text={"format": given})
        except ApiError as error:
            assert (error.status, error.param) == (400, "text.format")
        else:
            assert chat.response_format is not None
            assert chat.response_format["type"] == given["type"]
    assert responses_chats._response_format(
        responses_bodies.TextFormat("json_schema", "n", schema, True)
    ) == {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}


TEXT = {"type": "text", "text": "I ask."}
USE = {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}}
TOLD = {"type": "tool_result", "tool_use_id": "c1", "content": "snow"}
TOOL = {"name": "f", "description": "d", "input_schema": {"type": "object", "properties": {}}}
HASH = {"type": "text", "text": "x-anthropic-billing-header: 1"}


def assistant(*blocks: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(blocks)}


MESSAGES: list[dict[str, Any]] = [
    {"messages": [USER]},
    {"messages": [USER], "system": "Be brief."},
    {"messages": [USER], "system": [HASH, TEXT, {"type": "text", "text": "Be brief."}]},
    {"messages": [{"role": "user", "content": [TEXT, {**TEXT, "cache_control": {}}]}]},
    {"messages": [USER, assistant(TEXT, USE), {"role": "user", "content": [TOLD]}]},
    {"messages": [USER, assistant(USE, TEXT, {**USE, "id": "c2"}),
                  {"role": "user", "content": [TOLD, {**TOLD, "content": [TEXT]}, TEXT]}]},
    {"messages": [USER, assistant(USE), {"role": "user", "content": [{**TOLD, "content": None}]}]},
    {"messages": [USER, assistant({"type": "thinking", "thinking": "Hm.", "signature": "s"},
                                  {"type": "redacted_thinking", "data": "x"}, TEXT), USER]},
    {"messages": [USER, {"role": "system", "content": "Be."}, USER], "system": "Be brief."},
    {"messages": [USER, {"role": "system", "content": [HASH]}, USER]},
    {"messages": [USER, {"role": "assistant", "content": []}, USER]},
    {"messages": [USER], "tools": [TOOL, {"name": "g", "input_schema": {}, "strict": True}]},
    {"messages": [USER], "tools": [TOOL], "tool_choice": {"type": "none"}},
    {"messages": [USER], "tools": [TOOL],
     "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
    {"messages": [USER], "thinking": {"type": "disabled"}},
    {"messages": [USER], "thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}},
    {"messages": [USER], "stop_sequences": ["a"], "temperature": 0.5, "top_p": 0.9, "top_k": 3},
]  # fmt: skip


@pytest.mark.parametrize("given", MESSAGES, ids=range(len(MESSAGES)))
@pytest.mark.parametrize("anywhere", [True, False])
def test_messages(given: dict[str, Any], anywhere: bool) -> None:
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages

    full = {"model": "m", "max_tokens": 9} | given
    raw = json.dumps(full).encode()
    theirs = AnthropicServingMessages.to_chat_completion_request(
        AnthropicMessagesRequest.model_validate(json.loads(raw)), merge_inline_system=not anywhere
    )
    body = anthropic_bodies.parse(raw, anthropic_bodies.MessagesBody, VOCABULARY)
    mine = anthropic_chats.chat(body, lambda: anywhere)
    assert list(map(normal, mine.messages)) == list(map(normal, theirs.messages))
    tools = [tool.model_dump() for tool in theirs.tools] if theirs.tools else None
    assert json.dumps(mine.tools) == json.dumps(tools)
    assert (mine.tool_choice or "auto") == (theirs.tool_choice or "auto")
    if "tool_choice" in given:
        assert mine.parallel_tool_calls == theirs.parallel_tool_calls
    same = ("max_completion_tokens", "stop", "temperature", "top_p", "top_k", "reasoning_effort")
    for name in same:
        assert getattr(mine, name) == getattr(theirs, name), name
    assert not mine.continue_final_message


RESPONSES_FIELDS = [
    "stream", "temperature", "top_p", "top_k", "min_p", "seed", "max_output_tokens",
    "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "stop",
    "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "skip_special_tokens",
    "instructions", "metadata", "parallel_tool_calls", "store", "top_logprobs", "user",
    "service_tier", "include", "tool_choice", "max_tool_calls",
]  # fmt: skip
MESSAGES_FIELDS = [
    "stream", "temperature", "top_p", "top_k", "max_tokens", "stop_sequences", "system",
    "tool_choice", "thinking", "output_config",
]  # fmt: skip
#: What vLLM accepts and this receiver refuses, on purpose or for as long as chats do.
STRICTER: list[tuple[str, Any]] = [
    ("logit_bias", {"1": "nan"}),
    ("stop_token_ids", [True]),
    ("stop", ""),
    # As in chats.
    *(("top_logprobs", text) for text in ("1", "0", "1.0")),
    ("tool_choice", "required"),
]


def refused(read: Callable[[], object]) -> str:
    """Why, or nothing."""
    from vllm.exceptions import VLLMValidationError

    try:
        read()
    except (ApiError, ValueError, WireError, VLLMValidationError) as error:
        return str(error) or type(error).__name__
    return ""


def test_every_field_of_responses_is_taken_as_vllm_takes_it(tiny_llama_path: Path) -> None:
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    source = find_model(str(tiny_llama_path))
    tokenizer = Tokenizer(source)

    def mine(body: dict[str, Any]) -> None:
        found = sampling(responses_chat(**body), Defaults(source), tokenizer)
        check_sampling(found, VOCABULARY)

    def theirs(body: dict[str, Any]) -> None:
        request = ResponsesRequest.model_validate(json.loads(json.dumps(body)))
        limit = request.max_output_tokens
        checked(request.to_sampling_params(10**6 if limit is None else limit, {}))

    wrong = []
    for field in RESPONSES_FIELDS:
        for value in [*VALUES, "required", ["reasoning.encrypted_content"]]:
            body = {"input": "x", field: value}
            if field == "tool_choice":
                body["tools"] = [FUNCTION]
            elif field == "top_logprobs":
                body["include"] = ["message.output_text.logprobs"]
            both = refused(lambda body=body: mine(body)), refused(lambda body=body: theirs(body))
            stricter = both[0] and repr((field, value)) in map(repr, STRICTER)
            if bool(both[0]) != bool(both[1]) and not stricter:
                wrong.append((field, value, both[0][:150], both[1][:150]))
    assert not wrong, "\n".join(map(str, wrong))


def test_every_field_of_messages_is_taken_as_vllm_takes_it(tiny_llama_path: Path) -> None:
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages

    source = find_model(str(tiny_llama_path))
    tokenizer = Tokenizer(source)

    def mine(body: dict[str, Any]) -> None:
        raw = json.dumps(body).encode()
        read = anthropic_bodies.parse(raw, anthropic_bodies.MessagesBody, VOCABULARY)
        found = sampling(anthropic_chats.chat(read, lambda: True), Defaults(source), tokenizer)
        check_sampling(found, VOCABULARY)

    def theirs(body: dict[str, Any]) -> None:
        read = AnthropicMessagesRequest.model_validate(json.loads(json.dumps(body)))
        chat = AnthropicServingMessages.to_chat_completion_request(read)
        checked(chat.to_sampling_params(chat.max_completion_tokens, {}))

    wrong = []
    for field in MESSAGES_FIELDS:
        for value in [*VALUES, {"type": "auto"}, {"type": "none"}, {"effort": "low"}, [TEXT]]:
            body = {"model": "m", "max_tokens": 9, "messages": [USER], field: value}
            both = refused(lambda body=body: mine(body)), refused(lambda body=body: theirs(body))
            stricter = both[0] and repr((field, value)) in map(repr, STRICTER)
            if bool(both[0]) != bool(both[1]) and not stricter:
                wrong.append((field, value, both[0][:150], both[1][:150]))
    assert not wrong, "\n".join(map(str, wrong))


def checked(params: Any) -> None:
    """What vLLM's engine checks of a request."""
    model = SimpleNamespace(
        max_logprobs=MAX_LOGPROBS, get_vocab_size=lambda: VOCABULARY, max_model_len=8192
    )
    params._validate_logprobs(model)
    params._validate_logit_bias(model)
    params._validate_stop_token_ids(model)
