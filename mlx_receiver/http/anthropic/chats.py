"""From a Messages API request to the chat that it amounts to, as vLLM 0.32 translates it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from mlx_receiver.http.anthropic.bodies import (
    Block,
    CountBody,
    Message,
    MessagesBody,
    RedactedThinking,
    Text,
    Thinking,
    Tool,
    ToolChoice,
    ToolResult,
    ToolUse,
)
from mlx_receiver.http.errors import bad_request
from mlx_receiver.http.openai.bodies import ChatBody
from mlx_receiver.http.openai.translation import called, chat_body
from mlx_receiver.wire.messages import clipped

#: Chat's fields by their names here, where they differ.
NAMES: Final = {
    "max_completion_tokens": "max_tokens",
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
}

#: Claude Code's hash of each request, before its system prompt: it would make every prompt another.
_BILLING: Final = "x-anthropic-billing-header"

_CHOICES: Final = {"auto": "auto", "any": "required", "none": "none"}


def chat(body: CountBody, anywhere: Callable[[], bool]) -> ChatBody:
    """The chat. ``anywhere`` says whether the template takes system messages between others.

    Raises ApiError for what cannot be said.
    """
    choice = body.tool_choice
    fields: dict[str, Any] = {
        "messages": _messages(body, anywhere),
        "tools": [_tool(number, tool) for number, tool in enumerate(body.tools or ())] or None,
        "tool_choice": _tool_choice(choice) if body.tools and choice else None,
        "parallel_tool_calls": not (choice and choice.disable_parallel_tool_use),
        "chat_template_kwargs": body.chat_template_kwargs,
    }
    if isinstance(body, MessagesBody):
        fields |= {"max_completion_tokens": body.max_tokens, "stop": body.stop_sequences}
        last = fields["messages"][-1] if fields["messages"] else {}
        # Anthropic's clients begin the answer that they want.
        if last.get("role") == "assistant" and last.get("content") and not last.get("tool_calls"):
            fields["continue_final_message"] = True
    if (config := body.output_config) is not None:
        fields["reasoning_effort"] = config.effort
        if config.format is not None and config.format.schema is not None:
            schema = {"name": "json_schema", "schema": config.format.schema}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    if body.thinking is not None and body.thinking.type == "disabled":
        fields["reasoning_effort"] = "none"
    with called(NAMES):
        return chat_body(body, **fields)


def _messages(body: CountBody, anywhere: Callable[[], bool]) -> list[dict[str, Any]]:
    system = _texts(body.system or "")
    inline = any(message.role == "system" for message in body.messages) and anywhere()
    messages: list[dict[str, Any]] = []
    for number, message in enumerate(body.messages):
        if message.role != "system":
            _add(messages, message, f"messages[{number}].content")
            continue
        texts = _texts(message.content)
        if not inline:
            system += texts
        elif texts:
            messages.append({"role": "system", "content": "".join(texts)})
    if system:
        messages.insert(0, {"role": "system", "content": "".join(system)})
    return messages


def _texts(content: str | Iterable[Block]) -> list[str]:
    """Texts of a system prompt."""
    if isinstance(content, str):
        texts = [content]
    else:
        texts = [block.text for block in content if isinstance(block, Text)]
    return [text for text in texts if text and not text.startswith(_BILLING)]


def _add(messages: list[dict[str, Any]], message: Message, where: str) -> None:
    """Results of tools come before what the same message says."""
    if isinstance(message.content, str):
        messages.append({"role": message.role, "content": message.content})
        return
    made: dict[str, Any] = {"role": message.role}
    texts, thoughts = [], []
    for number, block in enumerate(message.content):
        match block:
            case Text():
                texts.append(block.text)
            case ToolUse():
                function = {"name": block.name, "arguments": block.input}
                call = {"id": block.id, "type": "function", "function": function}
                made.setdefault("tool_calls", []).append(call)
            case ToolResult():
                if message.role != "user":
                    raise bad_request(f"{where}[{number}]: tool_result is a user's", "messages")
                text = _result(block, f"{where}[{number}]")
                answer = {"role": "tool", "tool_call_id": block.tool_use_id, "content": text}
                messages.append(answer)
            case Thinking():
                thoughts.append(block.thinking)
            case RedactedThinking():
                pass
            case _:
                raise _no_text(f"{where}[{number}]")
    if thoughts:
        # Templates know it by either name.
        made["reasoning"] = made["reasoning_content"] = "".join(thoughts)
    if texts := [text for text in texts if text]:
        made["content"] = "\n".join(texts)
    if message.role == "assistant" or "content" in made:
        messages.append(made)


def _result(block: ToolResult, where: str) -> str:
    if not isinstance(block.content, list):
        return block.content or ""
    texts = []
    for number, part in enumerate(block.content):
        if not isinstance(part, Text):
            raise _no_text(f"{where}.content[{number}]")
        texts.append(part.text)
    return "\n".join(texts)


def _no_text(where: str) -> Exception:
    return bad_request(f"{where}: images and documents are not supported by this receiver",
                       "messages")  # fmt: skip


def _tool(number: int, tool: Tool) -> dict[str, Any]:
    """Chat's form, with the keys that vLLM shows to templates."""
    if tool.type not in (None, "custom"):
        raise bad_request(
            f"tools[{number}] is of type {clipped(repr(tool.type), 64)}: only the client's own "
            "tools are supported by this receiver",
            "tools",
        )
    if tool.input_schema is None:
        raise bad_request(f"tools[{number}] has no input_schema", "tools")
    if tool.defer_loading:
        raise bad_request(
            f"tools[{number}].defer_loading is not supported by this receiver", "tools"
        )
    function: dict[str, Any] = {
        "name": tool.name,
        "description": tool.description,
        "parameters": {**tool.input_schema, "type": tool.input_schema.get("type", "object")},
    }
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _tool_choice(choice: ToolChoice) -> str | dict[str, Any]:
    if choice.type != "tool":
        return _CHOICES[choice.type]
    if not choice.name:
        raise bad_request("tool_choice of type tool needs a name", "tool_choice")
    return {"type": "function", "function": {"name": choice.name}}
