"""Tool calls: finding them in the text as it grows, with mlx-lm's parser for the model."""

from __future__ import annotations

import json
import logging
import uuid
from typing import Any

from mlx_receiver.http.openai.responses import FunctionCall, ToolCall
from mlx_receiver.http.openai.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class ToolStream:
    """Splits one sample's text into content and tool calls.

    A call is reported whole, when its end marker has come. What the parser does not understand
    remains content: no text is lost.
    """

    def __init__(self, tokenizer: Tokenizer, tools: list[dict[str, Any]]) -> None:
        wrapper = tokenizer.wrapper
        self._start: str = wrapper.tool_call_start
        self._end: str = wrapper.tool_call_end
        self._parse = wrapper.tool_parser
        self._tools = tools
        self._held = ""
        self._blank = ""
        self._inside = False
        self.calls = 0

    def push(self, text: str, over: bool) -> tuple[str, list[ToolCall]]:
        """New content and new calls, with their ``index``."""
        self._held += text
        content = ""
        calls: list[ToolCall] = []
        while True:
            if not self._inside:
                before, marker, behind = self._held.partition(self._start)
                if not marker:
                    free = len(before) if over else len(before) - _overlap(before, self._start)
                    content, self._held = content + before[:free], before[free:]
                    break
                content, self._held, self._inside = content + before, behind, True
            if self._end and self._end in self._held:
                inner, _, self._held = self._held.partition(self._end)
                raw = self._start + inner + self._end
            elif over:
                # The model's end-of-text token was the end marker, or the text was cut.
                inner, self._held = self._held, ""
                raw = self._start + inner
            else:
                break
            self._inside = False
            found = self._calls(inner)
            calls += found
            content += "" if found else raw
        if self.calls and not content.strip():
            # Between and after calls it only separates them.
            self._blank += content
            return "", calls
        content, self._blank = self._blank + content, ""
        return content, calls

    def _calls(self, text: str) -> list[ToolCall]:
        try:
            parsed = self._parse(text, self._tools)
            entries = [
                self._entry(call) for call in (parsed if isinstance(parsed, list) else [parsed])
            ]
        except Exception as error:
            # Parsers raise whatever their format's parser raises on what a model made up.
            logger.info("a tool call could not be parsed: %s", error)
            return []
        for entry in entries:
            entry.index = self.calls
            self.calls += 1
        return entries

    @staticmethod
    def _entry(call: dict[str, Any]) -> ToolCall:
        arguments = call.get("arguments", {})
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        identity = str(call.get("id") or f"chatcmpl-tool-{uuid.uuid4().hex[:16]}")
        return ToolCall(id=identity, function=FunctionCall(str(call["name"]), arguments))


class ForcedCalls:
    """One sample's text where a call is forced, which is nothing but JSON: a named tool's
    arguments, or a list of calls. Reported when the text is over; what is no list of calls, because
    it was cut off, remains content.
    """

    def __init__(self, name: str) -> None:
        """``name`` is "" where it may be any tool, and several."""
        self._name = name
        self._text = ""

    def push(self, text: str, over: bool) -> tuple[str, list[ToolCall]]:
        """See ``ToolStream.push``."""
        self._text += text
        if not over:
            return "", []
        if self._name:
            return "", [_call({"name": self._name, "arguments": self._text}, 0)]
        try:
            calls = [
                _call({"name": call["name"], "arguments": call["parameters"]}, index)
                for index, call in enumerate(json.loads(self._text))
            ]
        except (ValueError, TypeError, KeyError):
            return self._text, []
        return "", calls


def _call(call: dict[str, Any], index: int) -> ToolCall:
    found = ToolStream._entry(call)
    found.index = index
    return found


def _overlap(text: str, marker: str) -> int:
    """Characters at the end of ``text`` that may begin ``marker``."""
    for size in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:size]):
            return size
    return 0
