"""Asking a server for a case's answer, and comparing two answers field by field."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import httpx

#: Not compared: names and times that are new for every request.
EXCLUDED = frozenset(
    {"id", "item_id", "request_id", "response_id", "system_fingerprint"}
    | {"created", "created_at", "completed_at"}
)
#: Two fp32 engines may differ by this much in a log-probability.
TOLERANCE = 2e-3

#: Strings that a stream sends piece by piece; others are repeated or sent once.
_PIECES = frozenset({"text", "content", "reasoning", "reasoning_content", "arguments"})


@dataclass
class Answer:
    """What a client saw, without what ``EXCLUDED`` names."""

    status: int
    content_type: str
    value: Any
    #: The kinds of a stream's chunks in order, repetitions left out, by choice.
    order: dict[str, list[str]] = field(default_factory=dict)


def ask(http: httpx.Client, path: str, body: dict[str, Any]) -> Answer:
    """Send one request; GET if it has no fields."""
    if body.get("stream"):
        with http.stream("POST", path, json=body) as response:
            lines = list(response.iter_lines())
            answer = _answer(response, None)
        events = [line[5:].strip() for line in lines if line.startswith("data:")]
        if not events:
            answer.value = _strip(json.loads("".join(lines)))
        elif path == "/v1/responses":
            _join_events(answer, [json.loads(event) for event in events if event != "[DONE]"])
        else:
            _join_chunks(answer, events)
        return answer
    response = http.post(path, json=body) if body else http.get(path)
    return _answer(response, response.json() if response.content else None)


def differences(a: Any, b: Any, at: str = "") -> list[str]:
    """Where two values differ, one line each."""
    if isinstance(a, dict) and isinstance(b, dict):
        found = [f"{at}.{key}: only in one" for key in sorted(a.keys() ^ b.keys(), key=str)]
        for key in a.keys() & b.keys():
            found += differences(a[key], b[key], f"{at}.{key}")
        return found
    if isinstance(a, list) and isinstance(b, list):
        if len(a) != len(b):
            return [f"{at}: {len(a)} and {len(b)} items: {a!r:.300} and {b!r:.300}"]
        return [line for i, pair in enumerate(zip(a, b, strict=True))
                for line in differences(*pair, f"{at}[{i}]")]  # fmt: skip
    if isinstance(a, float) and isinstance(b, float):
        return [] if abs(a - b) <= TOLERANCE else [f"{at}: {a} and {b}"]
    return [] if (type(a), a) == (type(b), b) else [f"{at}: {a!r} and {b!r}"]


def _answer(response: httpx.Response, value: Any) -> Answer:
    return Answer(response.status_code, response.headers.get("content-type", ""), _strip(value))


def _strip(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strip(item) for key, item in value.items() if key not in EXCLUDED}
    return [_strip(item) for item in value] if isinstance(value, list) else value


def _join_chunks(answer: Answer, events: list[str]) -> None:
    """What chunks add up to. How tokens are spread over chunks is a matter of timing."""
    whole: dict[str, Any] = {"choices": {}}
    for event in events:
        if event == "[DONE]":
            _note(answer, "stream", "done")
            continue
        chunk = _strip(json.loads(event))
        for choice in chunk.pop("choices", []):
            index = choice["index"]
            role = (choice.get("delta") or {}).get("role")
            _note(answer, str(index), "role" if role else "delta")
            whole["choices"][index] = _join(whole["choices"].get(index, {}), choice)
            if choice.get("finish_reason"):  # in a chunk of its own, or with the last pieces
                _note(answer, str(index), "finish")
                _note(answer, "stream", "finish")
        if chunk.get("usage") and not event.count('"index"'):
            _note(answer, "stream", "usage")
        whole |= {key: value for key, value in chunk.items() if value is not None}
    answer.value = whole


def _join_events(answer: Answer, events: list[dict[str, Any]]) -> None:
    """The same for a stream of typed events: deltas are joined, other events kept whole."""
    whole: list[Any] = []
    for event in events:
        event = _strip(event)
        event.pop("sequence_number", None)  # counts the deltas
        _note(answer, "stream", event["type"])
        if "delta" in event and whole and whole[-1]["type"] == event["type"]:
            whole[-1]["delta"] += event["delta"]
            whole[-1]["logprobs"] = [*whole[-1].get("logprobs", []), *event.get("logprobs", [])]
        else:
            whole.append(event)
    answer.value = whole


def _join(before: Any, new: Any, key: str = "") -> Any:
    if new is None:
        return before
    if isinstance(new, dict):
        before = before or {}
        return before | {name: _join(before.get(name), item, name) for name, item in new.items()}
    if isinstance(new, list):
        return [*(before or []), *new]
    if isinstance(new, str) and key in _PIECES:
        return (before or "") + new
    return new


def _note(answer: Answer, where: str, kind: str) -> None:
    kinds = answer.order.setdefault(where, [])
    if not kinds or kinds[-1] != kind:
        kinds.append(kind)
