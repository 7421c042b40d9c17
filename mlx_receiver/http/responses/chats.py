"""From a Responses API request to the chat that it amounts to, as vLLM 0.32 translates it."""

from __future__ import annotations

from typing import Any, Final, TypeVar

import msgspec

from mlx_receiver.http.errors import bad_request
from mlx_receiver.http.openai.bodies import ChatBody
from mlx_receiver.http.openai.translation import called, chat_body
from mlx_receiver.http.responses.bodies import (
    ITEM_TYPES,
    LOGPROBS,
    FunctionCall,
    FunctionCallOutput,
    FunctionTool,
    Item,
    Message,
    Part,
    ReasoningItem,
    ResponsesBody,
    TextFormat,
)
from mlx_receiver.wire.messages import clipped

#: Chat's fields by their names here, where they differ.
NAMES: Final = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
_TEXTS: Final = frozenset({"input_text", "output_text", "text", "reasoning_text", "summary_text"})
_UNFINISHED: Final = frozenset({"in_progress", "incomplete"})

_Kind = TypeVar("_Kind")


def chat(body: ResponsesBody, tools: list[FunctionTool]) -> ChatBody:
    """The chat. Raises ApiError for what it cannot say."""
    messages, unfinished = _messages(body)
    with_logprobs = LOGPROBS in (body.include or ())
    with called(NAMES):
        return chat_body(
            body,
            messages=messages,
            tools=[_tool(tool) for tool in tools] or None,
            tool_choice=_tool_choice(body) if tools else None,
            parallel_tool_calls=body.parallel_tool_calls,
            max_completion_tokens=body.max_output_tokens,
            stop=body.stop,
            logprobs=with_logprobs,
            top_logprobs=body.top_logprobs if with_logprobs else 0,
            response_format=_response_format(body.text.format if body.text else None),
            structured_outputs=body.structured_outputs,
            reasoning_effort=body.reasoning.effort if body.reasoning else None,
            chat_template_kwargs=body.chat_template_kwargs,
            continue_final_message=unfinished,
        )


def function_tools(body: ResponsesBody) -> list[FunctionTool]:
    """The tools. Raises ApiError for those that somebody else than the client would run."""
    found = []
    for number, tool in enumerate(body.tools):
        if tool.get("type") != "function":
            raise bad_request(
                f"tools[{number}] is of type {_shown(tool.get('type'))}: only function tools are "
                "supported by this receiver",
                "tools",
            )
        if tool.get("defer_loading"):
            raise bad_request(
                f"tools[{number}].defer_loading is not supported by this receiver", "tools"
            )
        found.append(_converted(tool, FunctionTool, f"tools[{number}]", "tools"))
    return found


def _tool(tool: FunctionTool) -> dict[str, Any]:
    """Chat's form, with the keys that vLLM shows to templates."""
    function: dict[str, Any] = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
    }
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _tool_choice(body: ResponsesBody) -> str | dict[str, Any]:
    choice = body.tool_choice
    if isinstance(choice, str):
        return choice
    if choice.get("type") == "function" and isinstance(choice.get("name"), str):
        return {"type": "function", "function": {"name": choice["name"]}}
    raise bad_request(
        f"tool_choice of type {_shown(choice.get('type'))} is not supported by this receiver: it "
        "must be auto, none, required, or a function's name",
        "tool_choice",
    )


def _response_format(form: TextFormat | None) -> dict[str, Any] | None:
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return {"type": "json_object"}
    fields = ("name", "description", "schema", "strict")
    schema = {name: getattr(form, name) for name in fields if getattr(form, name) is not None}
    return {"type": "json_schema", "json_schema": schema}


def _messages(body: ResponsesBody) -> tuple[list[dict[str, Any]], bool]:
    """The conversation, and whether its last message is to be continued."""
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}], False
    item: Item | None = None
    for number, given in enumerate(body.input):
        where = f"input[{number}]"
        item = _item(given, where)
        _add(messages, item, where)
    unfinished = isinstance(item, Message) and item.status in _UNFINISHED
    if isinstance(item, ReasoningItem) and item.status in _UNFINISHED:
        raise bad_request(f"{where}: reasoning cannot be continued by this receiver", "input")
    return messages, unfinished


def _item(given: dict[str, Any], where: str) -> Item:
    kind = given.get("type", "message")
    if kind not in ITEM_TYPES:
        raise bad_request(
            f"{where} is of type {_shown(kind)}: only {', '.join(ITEM_TYPES)} are supported by "
            "this receiver",
            "input",
        )
    # A union of tagged structs is no class.
    kinds: Any = Item
    found: Item = _converted({"type": kind, **given}, kinds, where, "input")
    return found


def _add(messages: list[dict[str, Any]], item: Item, where: str) -> None:
    """What a model says between two of others' messages is one message."""
    last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    match item:
        case FunctionCall():
            function = {"name": item.name, "arguments": item.arguments}
            made = {"id": item.call_id, "type": "function", "function": function}
            if last is None:
                last = {"role": "assistant"}
                messages.append(last)
            last.setdefault("tool_calls", []).append(made)
        case FunctionCallOutput():
            output = _text(item.output, f"{where}.output")
            messages.append({"role": "tool", "content": output, "tool_call_id": item.call_id})
        case ReasoningItem():
            if item.encrypted_content:
                raise bad_request(
                    f"{where}.encrypted_content is not supported by this receiver", "input"
                )
            thought = _text(item.content or item.summary[:1], where)
            if last is None or "reasoning" in last:
                last = {"role": "assistant"}
                messages.append(last)
            # Templates know it by either name.
            last["reasoning"] = last["reasoning_content"] = thought
        case Message():
            text = _text(item.content, f"{where}.content")
            if item.role == "assistant" and last is not None and "content" not in last:
                last["content"] = text
            else:
                messages.append({"role": item.role, "content": text})


def _text(content: str | list[Part], where: str) -> str:
    """The text of content, its parts a line each as chat has it. Raises ApiError."""
    if isinstance(content, str):
        return content
    texts = []
    for number, part in enumerate(content):
        text = part.refusal if part.type == "refusal" else part.text
        if text is None or part.type not in {*_TEXTS, "refusal"}:
            raise bad_request(
                f"{where}[{number}] is of type {_shown(part.type)}: only text is supported by this "
                "receiver",
                "input",
            )
        texts.append(text)
    return "\n".join(texts)


def _converted(given: dict[str, Any], kind: type[_Kind], where: str, field: str) -> _Kind:
    """The struct. Raises ApiError that says where it is wrong."""
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        raise bad_request(f"{where}: {clipped(str(error), 1024)}", field) from None


def _shown(name: object) -> str:
    return clipped(repr(name), 64)
