"""The next turn of a conversation with the receiver alone: only what is new is prefilled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from mlx_receiver.receiver import Receiver
from tests.mlx_receiver.client import started
from tests.waiting import eventually


@pytest.fixture(scope="module")
def keeping(tiny_llama_path: Path) -> Iterator[Receiver]:
    with started(tiny_llama_path, http_port=0, prompt_cache=True) as receiver:
        yield receiver


def ask(receiver: Receiver, prompt: list[int], **fields: Any) -> tuple[list[int], int]:
    """The answer's tokens, and how many of the prompt's were there."""
    body = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "return_token_ids": True,
            "ignore_eos": True} | fields  # fmt: skip
    answer = httpx.post(f"http://127.0.0.1:{receiver.http_port}/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    value = answer.json()
    tokens: list[int] = value["choices"][0]["token_ids"]
    return tokens, value["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_turns(keeping: Receiver) -> None:
    history = list(range(100, 400))
    for turn in range(4):
        tokens, cached = ask(keeping, history, cache_salt="mine")
        # Another salt, and so a cold answer.
        assert (tokens, 0) == ask(keeping, history, cache_salt=f"cold {turn}")
        assert cached == (0 if turn == 0 else len(history) - 20)
        history = [*history, *tokens, *range(500 + turn, 520 + turn)]
    assert ask(keeping, history)[1] == 0
    assert eventually(lambda: keeping.store.reserved_bytes == 0)


def test_a_salt_that_is_none(keeping: Receiver) -> None:
    for salt in ("", "x" * 2000, 5):
        answer = httpx.post(
            f"http://127.0.0.1:{keeping.http_port}/v1/completions",
            json={"prompt": [5, 6], "max_tokens": 2, "cache_salt": salt},
        )
        assert answer.status_code == 400 and "cache_salt" in answer.text
