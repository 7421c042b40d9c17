"""Many streams through one receiver: all right, none starved, and more than it admits."""

from __future__ import annotations

import contextlib
import json
import random
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import httpx
import pytest

from tests.servers import Receiver, Vllm, start_receiver
from tests.waiting import eventually

pytestmark = pytest.mark.server

CLIENTS = 32
PROMPTS = (1, 9, 40, 130, 260)
OUTPUTS = (8, 16, 32, 56)


@dataclass
class Stream:
    """One streamed response: its tokens, and when each chunk came."""

    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    finish: str = ""

    @property
    def longest_gap(self) -> float:
        """Seconds between two chunks after the first remote one."""
        return max((b - a for a, b in pairwise(self.times[1:])), default=0.0)


def stream(vllm: Vllm, prompt: list[int], output: int) -> Stream:
    """Ask for a greedy stream and follow it to its end."""
    body = {"model": "m", "prompt": prompt, "max_tokens": output, "temperature": 0,
            "ignore_eos": True, "stream": True, "return_token_ids": True}  # fmt: skip
    seen = Stream()
    with httpx.stream("POST", f"{vllm.url}/v1/completions", json=body, timeout=120) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                (choice,) = json.loads(line[6:])["choices"]
                seen.tokens += choice["token_ids"] or []
                seen.times.append(time.monotonic())
                seen.finish = choice["finish_reason"] or seen.finish
    return seen


@dataclass
class Crowd:
    """A vLLM, its requests, and what it answered to each by itself, without a receiver."""

    model: Path
    vllm: Vllm
    requests: list[tuple[list[int], int]]
    expected: list[list[int]]
    ports: dict[str, int]  # where its receiver is to listen

    def ask(self) -> list[Stream]:
        """All at once."""
        with ThreadPoolExecutor(CLIENTS) as pool:
            return list(pool.map(lambda request: stream(self.vllm, *request), self.requests))

    def wait_alone(self) -> None:
        """Wait until vLLM has noticed that the receiver is gone."""

        def alone() -> bool:
            self.vllm.tokens([5, 6, 7], 2)
            return self.vllm.metric("vllm:mac_decode_local_total", reason="no_receiver") > before

        before = self.vllm.metric("vllm:mac_decode_local_total", reason="no_receiver")
        assert eventually(alone, 30)


@pytest.fixture(scope="module")
def crowd(
    served: tuple[Vllm, Receiver], tiny_llama_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Crowd]:
    """32 requests of mixed lengths, asked one at a time while there is no receiver."""
    source = random.Random(17)
    requests = [
        ([source.randrange(20, 49000) for _ in range(PROMPTS[i % len(PROMPTS)])],
         OUTPUTS[i % len(OUTPUTS)])
        for i in range(CLIENTS)
    ]  # fmt: skip
    vllm, receiver = served
    ports = {"port": receiver.port, "http_port": receiver.http_port}
    found = Crowd(tiny_llama_path, vllm, requests, [], ports)
    receiver.server.stop()
    try:
        found.wait_alone()
        before = vllm.metric("vllm:mac_decode_tokens_total")
        found.expected = [vllm.tokens(prompt, output) for prompt, output in requests]
        assert vllm.metric("vllm:mac_decode_tokens_total") == before
        yield found
    finally:
        log = tmp_path_factory.mktemp("crowd") / "receiver.log"
        receiver.server = start_receiver(tiny_llama_path, log, **ports).server
    vllm.wait_connected(receiver, 40)


@contextlib.contextmanager
def receiving(crowd: Crowd, log: Path, *args: str) -> Iterator[Receiver]:
    """A connected receiver; vLLM knows that it is gone at the end."""
    receiver = start_receiver(crowd.model, log, args=args, **crowd.ports)
    try:
        crowd.vllm.wait_connected(receiver, 40)
        yield receiver
    finally:
        receiver.server.stop()
    crowd.wait_alone()


def idle(receiver: Receiver) -> dict[str, int]:
    """The receiver's health once its sessions are gone, at the latest after 10 seconds."""
    eventually(lambda: not receiver.health()["sessions"], 10, 0.1)
    health = receiver.health()
    return {name: health[name] for name in ("sessions", "decoding", "waiting", "kv_reserved_bytes")}


NOTHING = {"sessions": 0, "decoding": 0, "waiting": 0, "kv_reserved_bytes": 0}


def test_thirty_two_streams_are_right_and_none_starves(crowd: Crowd, tmp_path: Path) -> None:
    with receiving(crowd, tmp_path / "receiver.log") as receiver:
        # vLLM's CPU kernels are made when a batch first has their shape, on the receiver's cores.
        assert [s.tokens for s in crowd.ask()] == crowd.expected
        before = receiver.metric("mlx_receiver_decoded_tokens_total")
        streams = crowd.ask()
        assert [s.tokens for s in streams] == crowd.expected
        assert {s.finish for s in streams} == {"length"}
        decoded = receiver.metric("mlx_receiver_decoded_tokens_total") - before
        assert decoded == sum(output - 1 for _, output in crowd.requests)
        assert idle(receiver) == NOTHING
    # Starvation: one stream waits while others go on. Every step serves every stream, so the
    # longest pause within any stream is set beside the usual one. Joins, which copy the batch,
    # vLLM's prefills and other processes on the same cores are why it is not closer to one.
    gaps = [b - a for s in streams for a, b in pairwise(s.times[1:])]
    usual, longest = statistics.median(gaps), max(s.longest_gap for s in streams)
    handoff = max(s.times[1] - s.times[0] for s in streams)
    print(f"median gap {usual:.3f} s, longest {longest:.3f} s, longest hand-off {handoff:.3f} s")
    assert longest < max(10 * usual, 1.5)


def test_a_receiver_that_admits_two_refuses_the_rest(crowd: Crowd, tmp_path: Path) -> None:
    served = crowd.vllm
    with receiving(crowd, tmp_path / "receiver.log", "--max-sessions", "2") as receiver:
        before = served.metric("vllm:mac_decode_fallbacks_total", reason="refused_capacity")
        streams = crowd.ask()
        assert [s.tokens for s in streams] == crowd.expected
        assert {s.finish for s in streams} == {"length"}
        served.tokens([5, 6, 7], 1)
        refused = served.metric("vllm:mac_decode_fallbacks_total", reason="refused_capacity")
        assert refused - before >= CLIENTS // 2
        assert idle(receiver) == NOTHING
        served.wait_connected(receiver)  # refusals do not keep it from being used
