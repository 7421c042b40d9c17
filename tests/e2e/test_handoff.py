"""Hand-offs under the conditions that make exporting hard, against MLX's own greedy tokens."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.mlx_alone import greedy
from tests.servers import Receiver, Vllm

pytestmark = pytest.mark.server


def prompt_of(length: int, seed: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(20, 49000) for _ in range(length)]


def decoded(receiver: Receiver) -> float:
    return receiver.metric("mlx_receiver_decoded_tokens_total")


def test_prefix_hits_export_what_was_cached(
    vllm: Vllm, receiver: Receiver, tiny_llama_path: Path
) -> None:
    base = prompt_of(600, 1)
    prompts = [base, base, base + prompt_of(45, 2), base[:300] + prompt_of(10, 3)]
    expected = greedy(tiny_llama_path, prompts, 24)
    before = decoded(receiver)
    hits = vllm.metric("vllm:prefix_cache_hits_total")
    got = [vllm.tokens(prompt, 24) for prompt in prompts]
    assert got == expected
    assert decoded(receiver) - before == 4 * 23
    assert vllm.metric("vllm:prefix_cache_hits_total") - hits >= 1000


def test_sixteen_mixed_requests_at_once(
    vllm: Vllm, receiver: Receiver, tiny_llama_path: Path
) -> None:
    shared = prompt_of(150, 10)
    # Equal prefixes arriving together hit blocks that another request computes in the same step.
    prompts = [shared + prompt_of(5 + 11 * i, 20 + i) for i in range(8)]
    prompts += [prompt_of(n, 40 + n) for n in (1, 3, 17, 64, 130, 257, 400, 640)]
    expected = greedy(tiny_llama_path, prompts, 20)
    before = decoded(receiver)
    with ThreadPoolExecutor(16) as pool:
        got = list(pool.map(lambda p: vllm.tokens(p, 20), prompts))
    assert got == expected
    assert decoded(receiver) - before == 16 * 19


def test_one_prompt_several_samples(vllm: Vllm, receiver: Receiver) -> None:
    before = decoded(receiver)
    # No seed: vLLM's CPU worker dies when a seeded request's prefill is chunked ("CPU Generator
    # does not use offset"), with or without a connector.
    answer = vllm.complete(prompt_of(100, 5), 12, n=4, temperature=0.9, ignore_eos=True)
    assert len(answer["choices"]) == 4
    assert all(len(choice["token_ids"]) == 12 for choice in answer["choices"])
    assert len({tuple(choice["token_ids"]) for choice in answer["choices"]}) > 1
    assert answer["usage"]["completion_tokens"] == 48
    assert decoded(receiver) - before == 4 * 11


@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_client_that_goes_away_frees_both_sides(
    vllm: Vllm, receiver: Receiver, after: int
) -> None:
    body = {"model": "m", "prompt": prompt_of(700, 60 + after), "max_tokens": 1000,
            "stream": True, "ignore_eos": True}  # fmt: skip
    with httpx.stream("POST", f"{vllm.url}/v1/completions", json=body, timeout=60) as answer:
        for seen, _line in enumerate(answer.iter_lines()):
            if seen >= 2 * after:
                break
    receiver.assert_idle()
    assert vllm.metric("vllm:num_requests_running") == 0
    # vLLM frees blocks in its next step.
    vllm.tokens([5, 6, 7], 3)
    assert vllm.metric("vllm:kv_cache_usage_perc") == 0


def test_stop_conditions_are_the_clients(vllm: Vllm) -> None:
    prompt = prompt_of(40, 70)
    free = vllm.complete(prompt, 30, ignore_eos=True)["choices"][0]
    third = free["token_ids"][3]
    stopped = vllm.complete(prompt, 30, stop_token_ids=[third])["choices"][0]
    assert stopped["token_ids"] == free["token_ids"][:4]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", third)
    word = free["text"][10:16]
    by_text = vllm.complete(prompt, 30, stop=[word])["choices"][0]
    assert by_text["text"] == free["text"][: free["text"].index(word)]
    assert (by_text["finish_reason"], by_text["stop_reason"]) == ("stop", word)


def test_two_hundred_requests_leave_no_memory_behind(vllm: Vllm, receiver: Receiver) -> None:
    """vLLM's CPU worker grows by itself with every new batch shape (its kernels are cached), so
    handed-off requests are compared with as many local ones."""
    seeds = count(1000)

    def growth(requests: int, **fields: Any) -> list[int]:
        def ask(i: int) -> int:
            prompt = prompt_of(1 + 37 * i % 400, next(seeds))
            return len(vllm.tokens(prompt, 2 + i % 9, **fields))

        before = resident()
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(ask, range(requests))) == [2 + i % 9 for i in range(requests)]
        time.sleep(3)  # an idle receiver gives back what it freed
        return [after - start for start, after in zip(before, resident(), strict=True)]

    def resident() -> list[int]:
        kept = receiver.health()["kv_resident_bytes"] >> 10  # of earlier texts, and bounded
        ours = _resident_kib(receiver.server.process.pid) - kept
        return [*map(_resident_kib, _children(vllm)), ours]

    growth(50)  # staging buffers, MLX's kernels
    local = growth(200, vllm_xargs={"keep": "local"})
    handed_off = growth(200)
    receiver.assert_idle()
    vllm.tokens([5, 6, 7], 3)
    assert vllm.metric("vllm:kv_cache_usage_perc") == 0
    more = [ours - theirs for ours, theirs in zip(handed_off, local, strict=True)]
    assert max(more) < 40_000, f"KiB more after 200 requests: {handed_off}, local: {local}"


def _children(vllm: Vllm) -> list[int]:
    """Every process of the server's group."""
    group = vllm.server.process.pid
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[2]) == group:
            found.append(int(stat.parent.name))
    return sorted(found)


def _resident_kib(pid: int) -> int:
    """Resident memory that belongs to no file: libraries come and go as the kernel likes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1])
    return 0
