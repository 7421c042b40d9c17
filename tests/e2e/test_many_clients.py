"""Many streams through one receiver: all right, none starved, and more than it admits."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import Iterator
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
    """One streamed response: its tokens, and their number by time of arrival.

    Time is counted in arrivals at any stream. What comes without another's in between has come at
    once: the client was away.
    """

    tokens: list[int] = field(default_factory=list)
    arrivals: dict[int, int] = field(default_factory=dict)
    finish: str = ""


async def stream_all(url: str, requests: list[tuple[list[int], int]]) -> list[Stream]:
    """Ask for all at once, greedily, and follow them to their ends."""
    now, latest = 0, None

    async def follow(prompt: list[int], output: int) -> Stream:
        nonlocal now, latest
        body = {"model": "m", "prompt": prompt, "max_tokens": output, "temperature": 0,
                "ignore_eos": True, "stream": True, "return_token_ids": True}  # fmt: skip
        seen = Stream()
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    (choice,) = json.loads(line[6:])["choices"]
                    if latest is not seen:
                        now, latest = now + 1, seen
                    new = choice["token_ids"] or []
                    seen.tokens += new
                    seen.arrivals[now] = seen.arrivals.get(now, 0) + len(new)
                    seen.finish = choice["finish_reason"] or seen.finish
        return seen

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
        return await asyncio.gather(*(follow(*request) for request in requests))


def most_behind(streams: list[Stream]) -> int:
    """The most tokens that one stream got while another, which was running, waited for its next.

    What the waiting stream gets next, and what it got last, is taken off: a server that is slow to
    send joins tokens, and each stream gets as many as the others, one a little before another. The
    first arrival is vLLM's own token; a stream runs from its second one on.
    """
    worst = 0
    for waiting in streams:
        times = list(waiting.arrivals)[1:]
        for began, ended in pairwise(times):
            joined = waiting.arrivals[began] + waiting.arrivals[ended]
            for other in streams:
                others = sum(n for at, n in other.arrivals.items() if began < at < ended)
                worst = max(worst, others - joined)
    return worst


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
        return asyncio.run(stream_all(self.vllm.url, self.requests))

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


def test_thirty_two_streams_are_right_and_none_starves(crowd: Crowd, tmp_path: Path) -> None:
    behind = []
    with receiving(crowd, tmp_path / "receiver.log") as receiver:
        assert [s.tokens for s in crowd.ask()] == crowd.expected
        # Starvation is counted in tokens, not in seconds, so that a slow machine is none. A starved
        # stream waits until the others have ended. That each decode step serves every stream is the
        # engine's test; vLLM's front end and the client may take up what came at once in any order,
        # and now and then one late, but not each time.
        while not behind or (min(behind) > 40 and len(behind) < 3):
            before = receiver.metric("mlx_receiver_decoded_tokens_total")
            streams = crowd.ask()
            assert [s.tokens for s in streams] == crowd.expected
            assert {s.finish for s in streams} == {"length"}
            decoded = receiver.metric("mlx_receiver_decoded_tokens_total") - before
            assert decoded == sum(output - 1 for _, output in crowd.requests)
            receiver.assert_idle()
            behind.append(most_behind(streams))
    print(f"a running stream was at most {behind} tokens behind another")
    assert min(behind) <= 40  # of the 55 that the longest streams get


def test_a_receiver_that_admits_two_refuses_the_rest(crowd: Crowd, tmp_path: Path) -> None:
    served = crowd.vllm
    with receiving(crowd, tmp_path / "receiver.log", "--max-sessions", "2") as receiver:
        before = turned_away(served)
        streams = crowd.ask()
        assert [s.tokens for s in streams] == crowd.expected
        assert {s.finish for s in streams} == {"length"}
        served.tokens([5, 6, 7], 1)
        assert turned_away(served) - before >= CLIENTS // 2
        receiver.assert_idle()
        served.wait_connected(receiver)  # refusals do not keep it from being used


def turned_away(vllm: Vllm) -> float:
    """Requests that the receiver refused, or that were not sent because it said that it is full."""
    refused = vllm.metric("vllm:mac_decode_fallbacks_total", reason="refused_capacity")
    return refused + vllm.metric("vllm:mac_decode_local_total", reason="receiver_full")


def test_more_than_the_batch_wait_instead_of_falling_back(crowd: Crowd, tmp_path: Path) -> None:
    served = crowd.vllm
    with receiving(crowd, tmp_path / "receiver.log", "--max-batch", "2") as receiver:
        before = served.metric("vllm:mac_decode_fallbacks_total")
        streams = crowd.ask()
        assert [s.tokens for s in streams] == crowd.expected
        served.tokens([5, 6, 7], 1)
        assert served.metric("vllm:mac_decode_fallbacks_total") == before
        receiver.assert_idle()
