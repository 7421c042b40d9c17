"""What a client of each API hears when its answer breaks off: it reads too slowly."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import StreamingResponse

from mlx_receiver.http.anthropic.answer import messages
from mlx_receiver.http.openai import decoding
from mlx_receiver.http.openai.chat import chat_completions
from mlx_receiver.http.openai.service import Service
from mlx_receiver.http.responses.answer import responses
from mlx_receiver.receiver import Receiver

SAID = [{"role": "user", "content": "Hello"}]
BEHIND = "the client is 3 tokens behind"


def last_lines(receiver: Receiver, handler: Any, **fields: Any) -> list[str]:
    """The lines of the last two events that come to a client that waits after each."""
    body = {"ignore_eos": True, "stream": True, "temperature": 0} | fields
    arriving = [{"type": "http.request", "body": json.dumps(body).encode()}]

    async def receive() -> dict[str, Any]:
        if not arriving:
            await asyncio.Event().wait()  # the client stays
        return arriving.pop()

    async def read_slowly() -> list[str]:
        request = Request({"type": "http", "method": "POST", "headers": []}, receive)
        answer = await handler(Service(receiver), request)
        assert isinstance(answer, StreamingResponse)
        found = []
        async for event in answer.body_iterator:
            found.append(bytes(event).decode())
            await asyncio.sleep(0.2)
        return "".join(found[-2:]).strip().splitlines()

    return asyncio.run(read_slowly())


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MAX_AHEAD", 3)


def test_chats(receiver: Receiver) -> None:
    *_, error, _, done = last_lines(receiver, chat_completions, messages=SAID, max_tokens=2000)
    assert json.loads(error[6:])["error"]["message"] == BEHIND
    assert done == "data: [DONE]"


def test_responses(receiver: Receiver) -> None:
    *_, name, data = last_lines(receiver, responses, input="Hello", max_output_tokens=2000)
    assert name == "event: response.failed"
    event = json.loads(data[6:])
    assert event["response"]["status"] == "failed"
    assert event["response"]["error"] == {"code": "server_error", "message": BEHIND}
    assert event["sequence_number"] > 4


def test_messages(receiver: Receiver) -> None:
    *_, name, data = last_lines(receiver, messages, messages=SAID, max_tokens=2000)
    assert name == "event: error"
    error = {"type": "overloaded_error", "message": BEHIND}
    assert json.loads(data[6:]) == {"type": "error", "error": error}
