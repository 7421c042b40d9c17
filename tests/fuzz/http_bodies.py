"""Bodies of the receiver's HTTP API, and what a router's request carries of a hand-off.

Each is refused with an ApiError or read; what is read may be relied on.
"""

from __future__ import annotations

import json
import math
from typing import Any

from mlx_receiver.http.anthropic import bodies as anthropic_bodies
from mlx_receiver.http.anthropic import chats as anthropic
from mlx_receiver.http.anthropic.bodies import CountBody, MessagesBody
from mlx_receiver.http.errors import ApiError
from mlx_receiver.http.openai import claims
from mlx_receiver.http.openai.bodies import ChatBody, CompletionBody, SamplingBody, parse
from mlx_receiver.http.responses import bodies as responses_bodies
from mlx_receiver.http.responses import chats as responses
from mlx_receiver.http.responses.bodies import ResponsesBody
from tests.fuzz.structures import VOCABULARY, variants

ITEMS = (
    responses_bodies.Message,
    responses_bodies.FunctionCall,
    responses_bodies.FunctionCallOutput,
    responses_bodies.ReasoningItem,
)
BLOCKS = (
    anthropic_bodies.Text,
    anthropic_bodies.ToolUse,
    anthropic_bodies.ToolResult,
    anthropic_bodies.Thinking,
)
#: Parts of a body, with the rest of it around them.
AROUND = {
    **dict.fromkeys(ITEMS, (ResponsesBody, b'{"input": [%s]}')),
    **dict.fromkeys(
        BLOCKS,
        (MessagesBody, b'{"max_tokens": 9, "messages": [{"role": "user", "content": [%s]}]}'),
    ),
    responses_bodies.FunctionTool: (ResponsesBody, b'{"input": "", "tools": [%s]}'),
    anthropic_bodies.Tool: (MessagesBody, b'{"max_tokens": 9, "messages": [], "tools": [%s]}'),
}
BODIES = (CompletionBody, ChatBody, ResponsesBody, MessagesBody, CountBody, *AROUND)


def bodies(drawn: tuple[Any, Any]) -> int:
    """Completions, chats, and what becomes one: every field at, beyond and outside its range."""
    kind, value = drawn
    count = 0
    for variant in variants(kind, value):
        count += 1
        try:
            raw = json.dumps(variant, default=lambda other: other.decode("latin1")).encode()
        except (TypeError, ValueError):
            continue  # what JSON cannot say
        try:
            body = _read(raw, kind)
            claims.hand_off(body.kv_transfer_params, VOCABULARY)
        except ApiError as error:
            assert 400 <= error.status < 500, f"{error.status}: {error.message}"
            continue
        _rely(body)
    return count


def hand_offs(drawn: tuple[Any, Any]) -> int:
    """``kv_transfer_params["mac_decode"]``."""
    kind, value = drawn
    count = 0
    for variant in variants(kind, value):
        count += 1
        try:
            found = claims.hand_off({claims.KEY: variant}, VOCABULARY)
        except ApiError as error:
            assert error.status == 400
            continue
        if found is None:
            continue
        for token in (found.first_token, *found.prompt_token_ids):
            assert type(token) is int and 0 <= token < VOCABULARY
        if found.logprobs is not None:
            assert found.logprobs.token_ids and found.logprobs.values
            assert not any(map(math.isnan, found.logprobs.values))
        assert found.session_id is None or 0 <= found.session_id < 1 << 63
    return count


def _read(raw: bytes, kind: Any) -> SamplingBody:
    if kind in AROUND:
        kind, around = AROUND[kind]
        raw = around % raw
    if issubclass(kind, SamplingBody):
        return parse(raw, kind, VOCABULARY)
    if issubclass(kind, CountBody):
        return anthropic.chat(anthropic_bodies.parse(raw, kind, VOCABULARY), lambda: True)
    body = responses_bodies.parse(raw, VOCABULARY)
    return responses.chat(body, responses.function_tools(body))


def _rely(body: SamplingBody) -> None:
    ids = [*(body.allowed_token_ids or ()), *(body.stop_token_ids or ())]
    if isinstance(body, CompletionBody) and isinstance(body.prompt, list):
        for prompt in body.prompt:
            ids += prompt if isinstance(prompt, list) else []
    if isinstance(body, ChatBody):
        assert all(isinstance(message, dict) for message in body.messages)
        assert body.tools is None or body.tools
    for token in ids:
        assert not isinstance(token, int) or token >= 0
    assert body.n is None or 1 <= body.n <= 16384
    assert body.seed is None or -(1 << 63) <= body.seed < 1 << 63
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    assert len(stops) <= 4 and all(stops)
    for number in (body.temperature, body.top_p, body.min_p, body.repetition_penalty):
        assert number is None or math.isfinite(number)
