"""Thinking budgets of the receiver's own API."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from mlx_receiver.http.openai.prefill import Prefill
from mlx_receiver.receiver import Receiver
from mlx_receiver.wire.sampling import Sampling, Thinking
from tests.mlx_receiver.client import started
from tests.mlx_receiver.http.test_http import url

#: Special tokens of the test model's tokenizer that become marks of reasoning.
MARKS = {"<file_sep>": "<think>", "<filename>": "</think>"}


@pytest.fixture(scope="module")
def reasoner(
    tiny_llama_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Receiver, int, int]]:
    """A receiver whose model reasons, and the tokens that begin and end it."""
    model = tmp_path_factory.mktemp("reasoner") / "model"
    shutil.copytree(tiny_llama_path, model)
    for path in model.glob("*.json"):
        text = path.read_text()
        for token, mark in MARKS.items():
            text = text.replace(token, mark)
        path.write_text(text)
    tokens = json.loads((model / "tokenizer.json").read_text())["added_tokens"]
    ids = {token["content"]: int(token["id"]) for token in tokens}
    with started(model, http_port=0, kv_memory=1 << 28) as receiver:
        yield receiver, ids["<think>"], ids["</think>"]


def tokens(receiver: Receiver, path: str = "completions", **fields: Any) -> list[int]:
    body = {"max_tokens": 12, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    answer = httpx.post(url(receiver, f"/v1/{path}"), json=body | fields, timeout=60)
    assert answer.status_code == 200, answer.text
    found: list[int] = answer.json()["choices"][0]["token_ids"]
    return found


@pytest.mark.parametrize("budget", [0, 3, 2**40])
def test_the_end_comes_when_the_budget_is_spent(
    reasoner: tuple[Receiver, int, int], budget: int
) -> None:
    receiver, start, end = reasoner
    prompt = [30, 40, 50, start]
    free = tokens(receiver, prompt=prompt)
    assert end not in free and tokens(receiver, prompt=prompt, thinking_token_budget=-1) == free
    found = tokens(receiver, prompt=prompt, thinking_token_budget=budget)
    assert found[:budget] == free[:budget] and found[budget : budget + 1] in ([end], [])
    ended = tokens(receiver, prompt=[*prompt, end], thinking_token_budget=budget)
    assert ended == tokens(receiver, prompt=[*prompt, end])


def test_chats_have_one_too(reasoner: tuple[Receiver, int, int]) -> None:
    receiver, _, end = reasoner
    chat = {"messages": [{"role": "user", "content": "Hm? <think>"}]}
    found = tokens(receiver, "chat/completions", **chat, thinking_token_budget=9)
    assert found.count(end) == 1
    assert end not in tokens(receiver, "chat/completions", **chat)


def test_vllm_is_not_asked_for_the_prefill() -> None:
    """What it forces may be another text."""
    prefill = Prefill("http://127.0.0.1:1", "", 1, 1, 100)
    assert prefill.pays([5, 6], Sampling(9))
    assert not prefill.pays([5, 6], Sampling(9, thinking=Thinking(1, [5], [6], [6], "v2")))
