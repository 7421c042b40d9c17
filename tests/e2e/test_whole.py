"""Requests that the receiver does all of: vLLM computes nothing, and its clients notice nothing."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.test_handoff import prompt_of
from tests.e2e.test_pause import Reader
from tests.e2e.test_structured_output import SCHEMA, conforms
from tests.mlx_alone import greedy
from tests.servers import Receiver, Vllm, pair, start_receiver
from tests.waiting import eventually

pytestmark = pytest.mark.server

ARGS = (
    "--max-num-batched-tokens", "256", "--enable-prompt-tokens-details",
    "--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}',
)  # fmt: skip

#: What vLLM looks up and computes, whoever asked for it.
WORK = ("prefix_cache_queries_total", "mac_decode_local_total", "mac_decode_fallbacks_total")


@pytest.fixture(scope="module")
def served(
    tiny_llama_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Vllm, Receiver]]:
    logs = tmp_path_factory.mktemp("whole")
    env = {"MAC_DECODE_OFFLOAD": "mac"}
    with pair(tiny_llama_path, logs, args=ARGS, env=env) as servers:
        yield servers


@pytest.fixture
def vllm(served: tuple[Vllm, Receiver]) -> Vllm:
    return served[0]


@pytest.fixture
def receiver(served: tuple[Vllm, Receiver]) -> Receiver:
    return served[1]


def work(vllm: Vllm) -> list[float]:
    return [vllm.metric(f"vllm:{name}") for name in WORK]


def seen(receiver: Receiver, count: int) -> list[dict[str, Any]]:
    """The latest hand-offs, once so many more of them have ended."""
    receiver.assert_idle()
    found: list[dict[str, Any]] = httpx.get(f"{receiver.url}/handoffs").json()
    return found[-count:]


def test_tokens_equal_mlx_alone_and_vllm_computes_nothing(
    vllm: Vllm, receiver: Receiver, tiny_llama_path: Path
) -> None:
    prompts = [prompt_of(n, n) for n in (1, 3, 17, 64, 130, 257, 640, 1500)]
    expected = greedy(tiny_llama_path, prompts, 24)
    before = work(vllm)
    with ThreadPoolExecutor(len(prompts)) as pool:
        got = list(pool.map(lambda prompt: vllm.tokens(prompt, 24), prompts))
    assert got == expected
    assert work(vllm) == before
    assert {one["strategy"] for one in seen(receiver, len(prompts))} == {"mac"}


def test_what_vllm_counts_of_a_request(vllm: Vllm, receiver: Receiver) -> None:
    names = ("time_to_first_token_seconds", "request_queue_time_seconds",
             "request_prefill_time_seconds", "e2e_request_latency_seconds")  # fmt: skip
    counters = ("prompt_tokens_total", "generation_tokens_total", "mac_decode_tokens_total",
                "mac_decode_computed_tokens_total")  # fmt: skip

    def told() -> list[float]:
        return [
            *[vllm.metric(f"vllm:{name}_count") for name in names],
            *[vllm.metric(f"vllm:{name}") for name in counters],
        ]

    sums = [vllm.metric(f"vllm:{name}_sum") for name in names]
    before = told()
    began = time.monotonic()
    vllm.tokens(prompt_of(100, 7), 10)
    took = time.monotonic() - began

    def more() -> list[float]:
        return [b - a for a, b in zip(before, told(), strict=True)]

    # Ours come with the step that the end of the session causes.
    assert eventually(lambda: more() == [1, 1, 1, 1, 100, 10, 10, 100]), more()
    for name, start in zip(names, sums, strict=True):
        assert 0 <= vllm.metric(f"vllm:{name}_sum") - start <= took, name
    assert vllm.metric("vllm:num_requests_running") == 0


def test_several_samples_and_log_probabilities(vllm: Vllm, receiver: Receiver) -> None:
    before = work(vllm)
    answer = vllm.complete(prompt_of(100, 5), 12, n=2, temperature=0.9, ignore_eos=True, logprobs=2)
    texts = [choice["token_ids"] for choice in answer["choices"]]
    assert len(texts) == 2 and texts[0] != texts[1] and all(len(text) == 12 for text in texts)
    for choice in answer["choices"]:
        assert len(choice["logprobs"]["token_logprobs"]) == 12
    assert answer["usage"]["completion_tokens"] == 24
    assert work(vllm) == before


def test_stop_strings_and_least_lengths(vllm: Vllm) -> None:
    prompt = prompt_of(40, 70)
    free = vllm.complete(prompt, 30, ignore_eos=True)["choices"][0]
    word = free["text"][10:16]
    stopped = vllm.complete(prompt, 30, stop=[word])["choices"][0]
    assert stopped["text"] == free["text"][: free["text"].index(word)]
    first = free["token_ids"][0]
    only = vllm.complete(prompt, 30, stop_token_ids=[first])["choices"][0]
    assert (only["token_ids"], only["stop_reason"]) == ([first], first)
    held = vllm.complete(prompt, 12, stop_token_ids=[first], min_tokens=5)["choices"][0]
    assert first not in held["token_ids"][:5]


def test_turns_of_either_strategy_continue_each_other(
    vllm: Vllm, receiver: Receiver, tiny_llama_path: Path
) -> None:
    text, wanted = prompt_of(200, 11), []
    answers = []
    # What is told of the prompt is vLLM's: such a request is handed off once it is prefilled.
    for split in (False, True, False, False, True):
        answer = vllm.complete(
            text, 20, ignore_eos=True, **({"prompt_logprobs": 0} if split else {})
        )
        answers.append(answer)
        wanted.append(text)
        text = text + answer["choices"][0]["token_ids"] + prompt_of(12, len(text))
    got = [answer["choices"][0]["token_ids"] for answer in answers]
    assert got == greedy(tiny_llama_path, wanted, 20)
    told = seen(receiver, 5)
    assert [one["strategy"] for one in told] == ["mac", "split", "mac", "mac", "split"]
    for before, one, answer in zip(told, told[1:], answers[1:], strict=False):
        # All but the last token of the turn before, or two.
        assert 0 <= before["prompt_tokens"] + 20 - one["held_tokens"] <= 2
        if one["strategy"] == "mac":
            details = answer["usage"]["prompt_tokens_details"]
            assert details["cached_tokens"] == one["held_tokens"]


@pytest.mark.parametrize("after", [0, 4])
def test_a_client_that_goes_away_frees_both_sides(
    vllm: Vllm, receiver: Receiver, after: int
) -> None:
    body = {"model": "m", "prompt": prompt_of(900, 60 + after), "max_tokens": 1000,
            "stream": True, "ignore_eos": True}  # fmt: skip
    with httpx.stream("POST", f"{vllm.url}/v1/completions", json=body, timeout=60) as answer:
        for count, _line in enumerate(answer.iter_lines()):
            if count >= 2 * after:
                break
    assert seen(receiver, 1)[0]["outcome"] == "cancelled"
    assert eventually(lambda: vllm.metric("vllm:num_requests_running") == 0)


def test_structured_output(vllm: Vllm, receiver: Receiver) -> None:
    before = work(vllm)
    choices = ["perhaps", "certainly"]
    for fields, check in (
        ({"structured_outputs": {"json": SCHEMA}}, conforms),
        ({"structured_outputs": {"choice": choices}}, choices.index),
    ):
        answer = vllm.complete("The weather report of the town as data: ", 120, **fields)
        check(answer["choices"][0]["text"])
    assert work(vllm) == before


def restarted(served: tuple[Vllm, Receiver], model: Path, log: Path) -> None:
    """The receiver is there again, at the same ports."""
    vllm, receiver = served
    receiver.server.stop()
    again = start_receiver(model, log, port=receiver.port, http_port=receiver.http_port)
    receiver.server = again.server
    vllm.wait_connected(receiver)


def test_a_receiver_that_dies_before_the_first_token(
    served: tuple[Vllm, Receiver], tiny_llama_path: Path, tmp_path: Path
) -> None:
    vllm, receiver = served
    prompts = [prompt_of(300, 80), prompt_of(40, 81)]
    expected = greedy(tiny_llama_path, prompts, 24)
    queued = vllm.metric("vllm:prefix_cache_queries_total")
    receiver.server.signal(signal.SIGSTOP)
    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(vllm.tokens, prompt, 24) for prompt in prompts]
        texts = pool.submit(
            vllm.complete, "The sky is ", 20, structured_outputs={"choice": ["perhaps"]}
        )
        time.sleep(1)
        assert vllm.metric("vllm:prefix_cache_queries_total") == queued
        receiver.server.signal(signal.SIGKILL)
        assert [one.result() for one in running] == expected
        assert texts.result()["choices"][0]["text"] == "perhaps"
    assert vllm.metric("vllm:mac_decode_fallbacks_total", reason="lost") >= 3
    assert 0 <= vllm.metric("vllm:request_queue_time_seconds_sum") < 60
    restarted(served, tiny_llama_path, tmp_path / "again.log")


def test_a_receiver_that_dies_in_the_middle(
    served: tuple[Vllm, Receiver], tiny_llama_path: Path, tmp_path: Path
) -> None:
    vllm, receiver = served
    prompts = [prompt_of(60, 90 + seed) for seed in range(3)]
    expected = greedy(tiny_llama_path, prompts, 800)
    readers = [Reader(vllm, prompt, 800) for prompt in prompts]
    receiver.server.signal(signal.SIGKILL)
    assert [reader.ended() for reader in readers] == expected
    restarted(served, tiny_llama_path, tmp_path / "again.log")


def test_streaming_is_token_by_token(vllm: Vllm, tiny_llama_path: Path) -> None:
    prompt = prompt_of(50, 95)
    body = {"model": "m", "prompt": prompt, "max_tokens": 240, "temperature": 0, "stream": True,
            "ignore_eos": True, "return_token_ids": True,
            "stream_options": {"include_usage": True}}  # fmt: skip
    tokens, chunks, usage = [], 0, None
    with httpx.stream("POST", f"{vllm.url}/v1/completions", json=body, timeout=60) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    tokens += choice["token_ids"] or []
                    chunks += bool(choice["token_ids"])
    assert [tokens] == greedy(tiny_llama_path, [prompt], 240) and chunks > 5
    assert usage is not None and usage["completion_tokens"] == 240
