"""What a request's text has to conform to: response formats, structured outputs, forced tools."""

from __future__ import annotations

import json
from typing import Any, Final

import msgspec

from mlx_receiver.http.errors import bad_request
from mlx_receiver.http.openai.bodies import ChatBody, SamplingBody, Tool
from mlx_receiver.wire.ranges import MAX_GRAMMAR
from mlx_receiver.wire.sampling import Grammar, GrammarKind

_OBJECT: Final = '{"type": "object"}'

#: vLLM's kinds of ``structured_outputs``, of which a request has one, by the grammar's.
_KINDS: Final[dict[str, GrammarKind]] = {
    "json": "json",
    "json_object": "json",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
    "structural_tag": "structural_tag",
}


def grammar_of(body: SamplingBody) -> Grammar | None:
    """The request's grammar, as vLLM reads it; a forced tool comes before anything else. Raises
    ApiError naming the field that is wrong."""
    found = _of_tools(body) if isinstance(body, ChatBody) else None
    found = found or _of_format(body.response_format) or _of_outputs(body.structured_outputs)
    if found is None:
        return None
    grammar, field = found
    if len(grammar.text) > MAX_GRAMMAR:
        raise bad_request(f"{field} has more than {MAX_GRAMMAR} characters", field)
    if body.min_tokens > 1:
        # A text that is complete before its least length has no next token.
        raise bad_request(f"min_tokens above 1 does not go with {field}", "min_tokens")
    return grammar


def forced(body: ChatBody) -> str | None:
    """The tool that the answer calls; "" where it may be any, None where it need not be one."""
    choice = body.tool_choice
    if choice == "required":
        return ""
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def _check_tool_choice(body: ChatBody) -> None:
    """Raise ApiError for a choice among tools that are not there, or of an unknown form."""
    choice = body.tool_choice
    if choice in (None, "none"):
        return
    name = forced(body)
    if choice != "auto" and name is None:
        raise bad_request(
            "tool_choice must be auto, none, required or name a function", "tool_choice"
        )
    if body.tools is None:
        raise bad_request("tool_choice needs tools", "tool_choice")
    if name and name not in _tools(body):
        raise bad_request(f"tool_choice names {name!r}, which tools have not", "tool_choice")


def _tools(body: ChatBody) -> dict[str, Any]:
    """What each tool takes; an object of anything where that is not said."""
    tools = msgspec.convert(body.tools or [], list[Tool])
    return {
        tool.function.name: tool.function.parameters or {"type": "object", "properties": {}}
        for tool in tools
    }


def _of_tools(body: ChatBody) -> tuple[Grammar, str] | None:
    """A named tool's arguments, or for ``required`` a list of calls, as vLLM has them."""
    _check_tool_choice(body)
    name = forced(body)
    if name is None:
        return None
    tools = _tools(body)
    if name:
        return _schema(tools[name]), "tool_choice"
    definitions: dict[str, Any] = {}
    calls = []
    for tool, parameters in tools.items():
        inner = dict(parameters)
        for key, defined in (inner.pop("$defs", None) or {}).items():
            if definitions.setdefault(key, defined) != defined:
                raise bad_request(f"two tools define {key!r} in two ways", "tools")
        properties = {"name": {"type": "string", "enum": [tool]}, "parameters": inner}
        calls.append(
            {"type": "object", "properties": properties, "required": ["name", "parameters"]}
        )
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if body.parallel_tool_calls is False:
        schema["maxItems"] = 1
    if definitions:
        schema["$defs"] = definitions
    return _schema(schema), "tool_choice"


def _schema(schema: Any) -> Grammar:
    text = schema if isinstance(schema, str) else json.dumps(schema)
    return Grammar("json", text, closed=True)


def _of_format(given: dict[str, Any] | None) -> tuple[Grammar, str] | None:
    field = "response_format"
    match (given or {}).get("type", "text"):
        case "text":
            return None
        case "json_object":
            return Grammar("json", _OBJECT), field
        case "json_schema":
            inner = (given or {}).get("json_schema")
            schema = inner.get("schema") if isinstance(inner, dict) else None
            if not isinstance(schema, dict):
                raise bad_request("response_format.json_schema has no schema", field)
            return _schema(schema), field
        case "structural_tag":
            return Grammar("structural_tag", json.dumps(given), closed=True), field
        case kind:
            raise bad_request(f"response_format of the type {kind!r} is not known", field)


def _of_outputs(given: dict[str, Any] | None) -> tuple[Grammar, str] | None:
    field = "structured_outputs"
    asked = {key: value for key, value in (given or {}).items() if value is not None}
    kinds = [kind for kind in _KINDS if kind in asked]
    if not given:
        return None
    if len(kinds) != 1:
        raise bad_request(f"structured_outputs has one of {', '.join(_KINDS)}", field)
    (kind,) = kinds
    value = asked[kind]
    if kind == "json_object":
        if value is not True:
            raise bad_request("structured_outputs.json_object is true or left out", field)
        return Grammar("json", _OBJECT), field
    if kind == "json":
        if not isinstance(value, str | dict):
            raise bad_request("structured_outputs.json is no schema", field)
        return _schema(value), field
    if kind == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(c, str) for c in value):
            raise bad_request("structured_outputs.choice is no list of texts", field)
        return Grammar("choice", json.dumps(value)), field
    if not isinstance(value, str) or (kind != "regex" and not value.strip()):
        raise bad_request(f"structured_outputs.{kind} is no text, or an empty one", field)
    return Grammar(_KINDS[kind], value, closed=True), field
