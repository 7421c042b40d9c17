"""From a grammar as a client wrote it to one of llguidance's.

Runs in the trial's process (``trial``): texts are a stranger's, and Python that walks through a
large one must not take the interpreter from the decoding thread.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

from mlx_receiver.wire import trust
from mlx_receiver.wire.sampling import Grammar

#: Objects and lists within one another.
MAX_DEPTH: Final = 64

#: Keys whose values are schemas by name, and those whose values are schemas or lists of them.
_NAMED: Final = (
    "properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies",
)  # fmt: skip
_DIRECT: Final = (
    "additionalProperties", "unevaluatedProperties", "propertyNames", "contains", "items",
    "additionalItems", "unevaluatedItems", "prefixItems", "not", "if", "then", "else",
    "contentSchema", "allOf", "anyOf", "oneOf",
)  # fmt: skip

#: JSON's white space without carriage returns.
_SPACE: Final = r"[\x20\x0A\x09]+"

#: A terminal of Lark's for any text.
_FREE: Final = r"FREE: /(.|\n)*/"


def translated(grammar: Grammar) -> str:
    """The grammar as ``LLMatcher`` takes it. Raises ValueError naming what cannot be said in it."""
    import llguidance

    match grammar.kind:
        case "json":
            return llguidance.LLMatcher.grammar_from_json_schema(
                _schema(_parsed(grammar.text), grammar), overrides=_options(grammar)
            )
        case "choice":
            choices = _parsed(grammar.text)
            if not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
                raise ValueError("the choices are not a list of texts")
            return llguidance.grammar_from("choice", grammar.text)
        case "structural_tag":
            return _tagged(_parsed(grammar.text), grammar)
        case kind:
            return llguidance.grammar_from(kind, grammar.text)


def _options(grammar: Grammar) -> Any:
    """llguidance's options, of which a schema may not set others. White space is what xgrammar,
    vLLM's first choice of a library, allows, and ``oneOf`` is ``anyOf``, as there."""
    space = {} if grammar.compact else {"whitespace_pattern": _SPACE}
    return {
        "whitespace_flexible": not grammar.compact,
        "coerce_one_of": True,
        "lenient": False,
        **space,
    }


def _parsed(text: str) -> Any:
    """JSON that is not nested too deeply."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON: {error}") from None
    if not trust.within_depth([value], MAX_DEPTH):
        raise ValueError(f"it nests deeper than {MAX_DEPTH} levels")
    return value


def _schema(schema: Any, grammar: Grammar) -> str:
    """The schema, with what is ``closed`` in it said."""
    if grammar.closed:
        _close(schema)
    return json.dumps(schema)


def _close(schema: Any) -> None:
    """Say of every schema inside that lists properties, or first items, that there are no others,
    as vLLM's ``process_for_additional_properties`` does; numbers and texts stay what they are."""
    # A text must conform to all branches of an ``allOf`` at once, so each leaves the others' room.
    todo = [(schema, False)]
    while todo:
        node, shared = todo.pop()
        if isinstance(node, list):
            todo += [(child, shared) for child in node]
        if not isinstance(node, dict):
            continue
        for key in _NAMED:
            if isinstance(named := node.get(key), dict):
                todo += [(child, False) for child in named.values()]
        todo += [(node[key], key == "allOf") for key in _DIRECT if key in node]
        if shared or "allOf" in node:
            continue
        lists = isinstance(node.get("properties"), dict) or "patternProperties" in node
        if lists and "unevaluatedProperties" not in node:
            node.setdefault("additionalProperties", False)
        if "prefixItems" in node and "unevaluatedItems" not in node:
            node.setdefault("items", False)


# --- structural tags ----------------------------------------------------------------------------


def _tagged(tag: Any, grammar: Grammar) -> str:
    """A structural tag in Lark: the form with ``structures`` and ``triggers``, and of the form with
    a ``format`` what tool calls are made of."""
    if not isinstance(tag, dict):
        raise ValueError("the structural tag is not an object")
    if "structures" in tag:
        tags = [
            {
                "type": "tag",
                "begin": s["begin"],
                "content": {"type": "json_schema", "json_schema": s["schema"]},
                "end": s["end"],
            }
            for s in tag["structures"]
        ]
        tag = {"format": {"type": "triggered_tags", "triggers": tag["triggers"], "tags": tags}}
    rules = _Rules(grammar)
    start = rules.expression(tag.get("format"))
    return "\n".join(["%llguidance {}", f"start: {start}", *rules.lines]) + "\n"


class _Rules:
    """Lark's rules for the parts of a structural tag's format."""

    def __init__(self, grammar: Grammar) -> None:
        self.lines: list[str] = []
        self._grammar = grammar

    def expression(self, part: Any) -> str:
        """The right side of a rule for the part."""
        if not isinstance(part, dict):
            raise ValueError("a part of the structural tag's format is not an object")
        kind = part.get("type")
        match kind:
            case "const_string":
                return _text(part["value"])
            case "json_schema" if part.get("style", "json") == "json":
                options = {"x-guidance": _options(self._grammar)}
                schema = part["json_schema"]
                if isinstance(schema, dict):
                    schema = json.loads(_schema(schema, self._grammar)) | options
                elif schema is not True:
                    raise ValueError("a schema of the structural tag is not an object")
                else:
                    schema = {} | options
                return f"%json {json.dumps(schema)}"
            case "regex" if not part.get("excludes"):
                return self._regex(str(part["pattern"]))
            case "sequence":
                return " ".join(self._rule(each) for each in part["elements"]) or '""'
            case "or":
                return self._either(part["elements"])
            case "optional":
                return f"{self._rule(part['content'])}?"
            case "plus":
                return f"{self._rule(part['content'])}+"
            case "star":
                return f"{self._rule(part['content'])}*"
            case "tag" if isinstance(part["end"], str):
                content = self._rule(part["content"])
                return " ".join(filter(None, [_text(part["begin"]), content, _text(part["end"])]))
            case "tags_with_separator":
                return self._separated(part)
            case "triggered_tags" if not part.get("excludes"):
                return self._triggered(part)
        raise ValueError(f"structural tags of the kind {kind!r} are not supported")

    def _rule(self, part: Any) -> str:
        """A name for the part."""
        return self._named(self.expression(part))

    def _named(self, expression: str) -> str:
        name = f"part_{len(self.lines)}"
        self.lines.append(f"{name}: {expression}")
        return name

    def _regex(self, pattern: str) -> str:
        name = f"PART_{len(self.lines)}"
        # What is escaped stays so; a slash would end the expression.
        escaped = re.sub(r"\\.|/", lambda m: "\\/" if m[0] == "/" else m[0], pattern, flags=re.S)
        escaped = escaped.replace("\n", "\\n")
        self.lines.append(f"{name}: /{escaped}/")
        return name

    def _either(self, parts: Any) -> str:
        if not parts:
            raise ValueError("the structural tag allows nothing")
        return " | ".join(self._rule(each) for each in parts)

    def _separated(self, part: Any) -> str:
        one = self._named(self._either(part["tags"]))
        if part.get("stop_after_first"):
            return one if part.get("at_least_one") else f"{one}?"
        separator = _text(part.get("separator", ""))
        more = self._named(f"{one} ({separator} {one})*" if separator else f"{one}+")
        return more if part.get("at_least_one") else f"{more}?"

    def _triggered(self, part: Any) -> str:
        """Free text in which a trigger begins one of the tags that begin with it."""
        if part.get("at_least_one") or part.get("stop_after_first"):
            raise ValueError("triggered tags that must come, or come once, are not supported")
        if _FREE not in self.lines:
            self.lines.append(_FREE)
        tags = []
        for tag in part["tags"]:
            begin = tag["begin"]
            trigger = next((t for t in part["triggers"] if t and begin.startswith(t)), None)
            if trigger is None:
                raise ValueError("a structural tag begins with none of the triggers")
            rest = self._rule({**tag, "begin": begin[len(trigger) :]})
            opening = f"opening_{len(self.lines)}"
            self.lines.append(f"{opening}[lazy]: FREE {_text(trigger)}")
            tags.append(self._named(f"{opening} {rest}"))
        if not tags:
            raise ValueError("the structural tag has no tags")
        return f"({' | '.join(tags)})* FREE"


def _text(text: Any) -> str:
    """A literal of Lark's; nothing for an empty one."""
    if not isinstance(text, str):
        raise ValueError("a text of the structural tag is none")
    return json.dumps(text) if text else ""
