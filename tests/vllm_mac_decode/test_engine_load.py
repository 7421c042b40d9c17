"""What vLLM has to do, read from its own queues."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue
from vllm.v1.request import Request

from vllm_mac_decode.engine import adapter
from vllm_mac_decode.scheduler.port import EngineLoad


def request(name: str, prompt: int, computed: int = 0) -> Request:
    made = Request(name, list(range(prompt)), SamplingParams(max_tokens=9), None)
    made.num_computed_tokens = computed
    return made


def load(waiting: list[Request], running: list[Request], policy: str, besides: str) -> EngineLoad:
    queue = create_request_queue(SchedulingPolicy(policy))
    for one in waiting:
        queue.add_request(one)
    core: Any = SimpleNamespace(scheduler=SimpleNamespace(waiting=queue, running=running))
    return adapter.EngineAdapter.load(SimpleNamespace(_core=core), besides)  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_prompts_and_texts_are_told_apart(policy: str) -> None:
    waiting = [request("a", 100), request("b", 50), request("new", 70)]
    running = [request("c", 200, 150), request("d", 30, 30), request("e", 30, 35)]
    found = load(waiting, running, policy, "new")
    assert found.waiting == 3 and found.rows == 2
    assert set(found.pending) == {("c", 50), ("a", 100), ("b", 50)}
    assert len(list(found.pending)) == 3


def test_a_long_queue_is_not_read_to_its_end() -> None:
    waiting = [request(f"r{number}", 10) for number in range(1000)]
    found = load(waiting, [], "fcfs", "r999")
    assert len(found.pending) == adapter._LOOKED_AT and found.waiting >= 999
