"""Conversations whose answers the receiver decodes, beside a vLLM that decodes them itself."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import cached_family, free_port
from tests.e2e.conftest import ARGS
from tests.e2e.test_handoff import prompt_of
from tests.families import for_mlx
from tests.mlx_alone import greedy
from tests.servers import Vllm, pair, start_receiver, start_vllm

pytestmark = [pytest.mark.server, pytest.mark.slow]

#: vLLM's CPU build has blocks of 128 tokens. Of steps of 256 a shadow, which has a token more than
#: its blocks, takes one block.
PROMPT, ANSWER, QUESTION = 270, 400, 20


@dataclass
class Turn:
    """Tokens, so that a turn's answer is the next one's prompt to the token: the text of random
    weights is not."""

    tokens: list[int]
    text: str
    cached: int


def turn(vllm: Vllm, prompt: list[int], tokens: int, **fields: Any) -> Turn:
    answer = vllm.complete(prompt, tokens, ignore_eos=True, **fields)
    choice, details = answer["choices"][0], answer["usage"]["prompt_tokens_details"]
    return Turn(choice["token_ids"], choice["text"], (details or {}).get("cached_tokens") or 0)


def talk(vllm: Vllm, seed: int, salt: str | None = None, rest: bool = False) -> list[Turn]:
    """Two turns, the second of which contains the first's answer."""
    fields = {"cache_salt": salt} if salt else {}
    prompt = prompt_of(PROMPT, seed)
    first = turn(vllm, prompt, ANSWER, **fields)
    if rest:
        settled(vllm)
    second = [*prompt, *first.tokens, *prompt_of(QUESTION, seed + 1)]
    return [first, turn(vllm, second, 8, **fields)]


def settled(vllm: Vllm, seconds: float = 60.0) -> float:
    """Wait until nothing more is shadowed; how many tokens were. A shadow's own step tells."""
    until, since, last = time.monotonic() + seconds, time.monotonic(), -1.0
    while time.monotonic() < until:
        shadowed = vllm.metric("vllm:mac_decode_shadow_tokens_total")
        if shadowed != last:
            last, since = shadowed, time.monotonic()
        elif time.monotonic() - since > 2:
            return shadowed
        time.sleep(0.1)
    raise AssertionError(f"still at it after {seconds} s")


@contextlib.contextmanager
def alone(model: Path, log: Path) -> Iterator[Vllm]:
    vllm = start_vllm(model, log, args=ARGS)
    try:
        yield vllm
    finally:
        vllm.server.stop()


#: What a dashboard shows of the requests that there were.
SEEN = ("request_success_total", "prompt_tokens_total", "generation_tokens_total",
        "prefix_cache_queries_total", "prefix_cache_hits_total",
        "time_to_first_token_seconds_count", "iteration_tokens_total_sum")  # fmt: skip


def seen(vllm: Vllm) -> dict[str, float]:
    return {name: vllm.metric(f"vllm:{name}") for name in SEEN}


def test_the_next_turn_finds_what_a_vllm_alone_would_find(
    tiny_llama_path: Path, tmp_path: Path, vllm: Vllm
) -> None:
    def both(vllm: Vllm) -> tuple[list[Turn], list[Turn], dict[str, float]]:
        before = seen(vllm)
        told = talk(vllm, 800, rest=True), talk(vllm, 800, "s", rest=True)
        vllm.tokens([5, 6, 7], 1)
        return *told, {name: value - before[name] for name, value in seen(vllm).items()}

    with alone(tiny_llama_path, tmp_path / "alone.log") as other:
        expected = both(other)
    before = settled(vllm)
    got = both(vllm)
    shadowed = settled(vllm) - before
    assert got == expected
    # Of 669 tokens with KV before the question, in both conversations.
    assert [told[1].cached for told in got[:2]] == [640, 640]
    assert shadowed == 2 * (640 - 256)


def test_without_it_the_answer_is_prefilled_again(
    tiny_llama_path: Path, tmp_path: Path, vllm: Vllm
) -> None:
    off = {"MAC_DECODE_SHADOW_PREFILL": "false"}
    with pair(tiny_llama_path, tmp_path, args=ARGS, env=off) as (other, _):
        without = talk(other, 810)
        assert other.metric("vllm:mac_decode_shadow_tokens_total") == 0
    got = talk(vllm, 810, rest=True)
    assert [told.tokens for told in got] == [told.tokens for told in without]
    assert (without[1].cached, got[1].cached) == (256, 640)


def test_a_response_that_falls_back_goes_on_almost_at_once(
    tiny_llama_path: Path, tmp_path: Path
) -> None:
    prompt = prompt_of(PROMPT, 820)
    [expected] = greedy(tiny_llama_path, [prompt], 900)
    body = {"model": "m", "prompt": prompt, "max_tokens": 900, "temperature": 0, "stream": True,
            "ignore_eos": True, "return_token_ids": True}  # fmt: skip
    tokens: list[int] = []
    hits = 0.0
    with pair(tiny_llama_path, tmp_path, args=ARGS) as (vllm, receiver):
        url = f"{vllm.url}/v1/completions"
        with httpx.stream("POST", url, json=body, timeout=120) as answer:
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                tokens += json.loads(line.removeprefix("data: "))["choices"][0]["token_ids"]
                if len(tokens) >= 600 and receiver.server.process.poll() is None:
                    hits = vllm.metric("vllm:prefix_cache_hits_total")
                    receiver.server.signal(signal.SIGKILL)
                    receiver.server.process.wait()
        assert vllm.metric("vllm:mac_decode_fallbacks_total") == 1
        assert tokens == expected
        # 256 are the prompt's; 870 are there, and more where the reader of the stream is late. The
        # last chunk may have been under way.
        found = vllm.metric("vllm:prefix_cache_hits_total") - hits
        assert found in range(512, PROMPT + 900, 128)


def keep_busy(vllm: Vllm, pause: float, over: threading.Event) -> int:
    """Have vLLM itself decode one text after the other until it is over; how many there were."""
    body = {"model": "m", "prompt": prompt_of(8, 1), "max_tokens": 2000, "temperature": 0,
            "ignore_eos": True, "stream": True, "vllm_xargs": {"keep": "local"}}  # fmt: skip
    time.sleep(pause)
    texts = 0
    while not over.is_set():
        texts += 1
        with httpx.stream("POST", f"{vllm.url}/v1/completions", json=body, timeout=120) as answer:
            assert answer.status_code == 200
            for _ in answer.iter_lines():
                if over.is_set():
                    break
    return texts


def test_requests_overtake_what_is_left_to_shadow(vllm: Vllm) -> None:
    """Eight answers end while vLLM is busy, so that all of them wait when it is not."""
    total = 8 * (640 - 256)
    early = []
    for attempt in range(3):
        before = settled(vllm)
        prompts = [prompt_of(PROMPT, 830 + 10 * attempt + i) for i in range(8)]
        over = threading.Event()
        with ThreadPoolExecutor(2) as pool:
            # Two, so that one begins while the other one goes on, however long that takes.
            busy = [pool.submit(keep_busy, vllm, 0.7 * i, over) for i in range(2)]
            try:
                time.sleep(1)
                answers = vllm.complete(prompts, ANSWER, ignore_eos=True)
                held = vllm.metric("vllm:mac_decode_shadow_tokens_total") - before
            finally:
                over.set()
            assert len(answers["choices"]) == 8
            assert held == 0, "nothing is shadowed while somebody's request runs"
            assert all(one.result() for one in busy)
        vllm.tokens(prompt_of(20, 831), 1)
        early.append(vllm.metric("vllm:mac_decode_shadow_tokens_total") - before)
        assert settled(vllm) - before == total
        if early[-1] <= total / 2:
            break
    assert early[-1] <= total / 2, f"of {total} tokens these were shadowed first: {early}"


@pytest.mark.parametrize(("family", "full"), [("gpt_oss", 640), ("gemma4", 512)])
def test_layers_with_a_window(family: str, full: int, tmp_path: Path) -> None:
    """vLLM keeps of them what goes on from a prompt, not what goes on from a block that it decoded:
    of a conversation that it decodes itself it finds less than of one that came back. Layers of two
    sizes have 256 tokens in common blocks."""
    model, port = cached_family(family), free_port()
    args = ("--max-model-len", "1000", "--enable-prefix-caching", "--enable-prompt-tokens-details")
    at = f"127.0.0.1:{port}"
    vllm = start_vllm(model, tmp_path / "vllm.log", receiver=at, args=args, wait=False)
    receiver = start_receiver(for_mlx(family, model), tmp_path / "receiver.log", port=port)
    try:
        vllm.wait_healthy()
        vllm.wait_connected(receiver)
        prompt = [1 + 7 * i % 500 for i in range(PROMPT)]
        cached = {}
        for who, fields in {"vllm": {"vllm_xargs": {"keep": "local"}}, "receiver": {}}.items():
            salted = fields | {"cache_salt": who}
            first = turn(vllm, prompt, ANSWER, **salted)
            settled(vllm)
            cached[who] = turn(vllm, [*prompt, *first.tokens, 5, 6], 2, **salted).cached
        shadowed = settled(vllm)
        assert cached["receiver"] == full >= cached["vllm"] >= 256
        assert shadowed == full - 256
    finally:
        receiver.server.stop()
        vllm.server.stop()
