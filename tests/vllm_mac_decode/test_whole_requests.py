"""vLLM's own classes around requests that its scheduler is not given."""

from __future__ import annotations

import queue
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreEventType
from vllm.v1.request import Request

from mlx_receiver.wire.messages import Decoded
from vllm_mac_decode.engine import adapter


class Relay:
    """Says that ``mine`` are the receiver's."""

    def __init__(self, *mine: str, broken: bool = False) -> None:
        self.mine, self.broken = mine, broken
        self.asked: list[str] = []

    def on_new_request(self, request: Any) -> bool:
        self.asked.append(request.request_id)
        if self.broken:
            raise RuntimeError("no")
        return request.request_id in self.mine

    def given_away(self, request_id: str) -> bool:
        return request_id in self.mine


class Scheduler:
    """vLLM's, as far as it is wrapped."""

    def __init__(self, relay: Relay | None) -> None:
        self.requests: dict[str, Any] = {}
        self.faults: list[str] = []
        self.connector = SimpleNamespace(relay=relay, fault=self.faults.append)
        if relay is None:
            self.connector = None

    def take(self, request: Any) -> None:
        self.requests[request.request_id] = request

    add_request = adapter._deciding(take)


def request(name: str) -> Request:
    return Request(name, [1, 2, 3], SamplingParams(max_tokens=4), None)


def test_a_receivers_request_does_not_reach_the_scheduler() -> None:
    relay = Relay("a")
    scheduler = Scheduler(relay)
    for name in ("a", "b"):
        scheduler.add_request(request(name))
    assert list(scheduler.requests) == ["b"] and relay.asked == ["a", "b"]


def test_more_input_of_a_request_is_no_new_one() -> None:
    relay = Relay()
    scheduler = Scheduler(relay)
    for _ in range(2):
        scheduler.add_request(request("a"))
    assert relay.asked == ["a"]


@pytest.mark.parametrize("relay", [None, Relay("a", broken=True)])
def test_without_a_relay_that_works_everything_does(relay: Relay | None) -> None:
    scheduler = Scheduler(relay)
    scheduler.add_request(request("a"))
    assert list(scheduler.requests) == ["a"]
    assert scheduler.faults == (["on_new_request"] if relay else [])


def test_engines_that_step_together_do_not_wait_for_one_that_gave_its_request_away() -> None:
    class Core:
        def __init__(self) -> None:
            self.scheduler = Scheduler(Relay("a"))
            self.engines_running = False
            self.waves: list[int] = []

        def take(self, request: Any, request_wave: int = 0) -> None:
            self.scheduler.add_request(request)
            self.waves.append(request_wave)

        add_request = adapter._joining(take)

    core = Core()
    core.add_request(request("b"), 3)
    assert not core.engines_running, "vLLM's own work makes it step"
    core.add_request(request("a"), 4)
    assert core.engines_running and core.waves == [3, 4]


def engine(log_stats: bool) -> adapter.EngineAdapter:
    made = object.__new__(adapter.EngineAdapter)
    made._core = SimpleNamespace(scheduler=SimpleNamespace(log_stats=log_stats))
    made._input, made._output = queue.Queue(), queue.Queue()
    return made


@pytest.mark.parametrize("log_stats", [True, False])
def test_the_first_output_tells_what_vllm_tells_of_a_prefill(log_stats: bool) -> None:
    made, asked = engine(log_stats), request("a")
    made.prefilled_elsewhere(asked, 2, 10.0, 11.0)
    for position in range(2):
        made.emit_decoded([(asked, Decoded(1, position, [7]))])
    _, first = made._output.get_nowait()
    _, second = made._output.get_nowait()
    stats = first.outputs[0].prefill_stats
    assert (stats.num_prompt_tokens, stats.num_computed_tokens, stats.num_cached_tokens) == (
        3, 1, 2,
    )  # fmt: skip
    told = [(event.type, event.timestamp) for event in first.outputs[0].events or ()]
    assert told == (
        [(EngineCoreEventType.QUEUED, 10.0), (EngineCoreEventType.SCHEDULED, 11.0)]
        if log_stats
        else []
    )
    assert second.outputs[0].events is None and second.outputs[0].prefill_stats is None


def test_what_goes_back_goes_back_as_it_came() -> None:
    made, asked = engine(True), request("a")
    made.requeue(asked)
    _, (queued, wave) = made._input.get_nowait()
    assert queued is asked and wave == 0 and not asked.events
    assert asked.prefill_stats is not None
