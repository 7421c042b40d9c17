"""In which order a GPU is told to gather and to copy. The CUDA runtime here only takes notes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_mac_decode.worker import staging
from vllm_mac_decode.worker.staging import SLOT_BYTES, DeviceClock, Slot, StagingRing

CUDA = torch.device("cuda", 0)


class Runtime:
    """What of ``torch.cuda`` staging uses; ``calls`` says what was asked of it, in order."""

    def __init__(self, integrated: bool) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.integrated = integrated
        self.current: Any = None
        self.events = 0
        runtime = self

        class Stream:
            def __init__(self, device: torch.device, priority: int) -> None:
                assert priority < 0, "behind compute, a gather waits for long kernels"

            def wait_event(self, event: Any) -> None:
                runtime.calls.append(("wait", self, event))

        class Event:
            def record(self, stream: Any) -> None:
                runtime.calls.append(("record", stream, self))

            def synchronize(self) -> None:
                runtime.calls.append(("host waits", self))

        self.Stream, self.Event = Stream, Event

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        """Everything inside is queued there."""
        self.current = stream
        yield
        self.current = None

    def get_device_properties(self, device: torch.device) -> Any:
        """Of the one GPU."""
        return SimpleNamespace(is_integrated=self.integrated)

    def synchronize(self, device: torch.device) -> None:
        """Nothing is ever queued."""

    def gather(self, out: torch.Tensor) -> None:
        """A kernel of the test's own."""
        self.calls.append(("gather", self.current, out.data_ptr()))
        out.fill_(7)


@pytest.fixture
def runtime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Runtime:
    """A GPU with its own memory, or, as parameter True, with the CPU's."""
    made = Runtime(getattr(request, "param", False))
    staging._one_memory.cache_clear()
    request.addfinalizer(staging._one_memory.cache_clear)
    for name in ("Stream", "Event", "stream", "get_device_properties", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, getattr(made, name))
    real = torch.empty, torch.zeros

    def on_the_cpu(make: Any) -> Any:
        def call(*shape: Any, **options: Any) -> torch.Tensor:
            options.pop("pin_memory", None)
            options.pop("device", None)
            return make(*shape, **options)

        return call

    monkeypatch.setattr(torch, "empty", on_the_cpu(real[0]))
    monkeypatch.setattr(torch, "zeros", on_the_cpu(real[1]))
    monkeypatch.setattr(staging, "_device_view", lambda host: host)
    return made


def fill(runtime: Runtime, slot: Slot) -> Any:
    """One piece of 24 bytes; the event behind which it may be gathered."""
    written = object()
    slot.fill(24, runtime.gather, written)
    return written


def test_a_copy_has_its_own_stream_and_waits_for_its_gather(runtime: Runtime) -> None:
    ring = StagingRing(4 * SLOT_BYTES, CUDA)
    slot = ring.acquire(24)
    written = fill(runtime, slot)
    slot.wait()
    (_, gathers, _), (_, on, _), (_, _, gathered), (_, copies, waited), last, host = runtime.calls
    assert [call[0] for call in runtime.calls] == [
        "wait", "gather", "record", "wait", "record", "host waits",
    ]  # fmt: skip
    assert runtime.calls[0][2] is written and on is gathers and waited is gathered
    assert copies is not gathers, "the next gather would wait for this copy"
    assert last[1] is copies and host[1] is last[2], "the host must wait for the copy"
    assert slot.memory[:24] == bytes([7] * 24)


@pytest.mark.parametrize("runtime", [True], indirect=True)
def test_with_one_memory_nothing_is_copied(runtime: Runtime) -> None:
    ring = StagingRing(4 * SLOT_BYTES, CUDA)
    slot = ring.acquire(24)
    fill(runtime, slot)
    slot.wait()
    _, (_, _, place), (_, stream, gathered), host = runtime.calls
    assert [call[0] for call in runtime.calls] == ["wait", "gather", "record", "host waits"]
    assert place == torch.frombuffer(slot.memory, dtype=torch.uint8).data_ptr()
    assert stream is ring.stream and host[1] is gathered


@pytest.mark.parametrize("runtime", [True], indirect=True)
@pytest.mark.parametrize("fault", ["lost", "refused"])
def test_one_memory_that_does_not_work_is_copied(
    runtime: Runtime, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def view(host: torch.Tensor) -> torch.Tensor:
        if fault == "refused":
            raise RuntimeError("no such view")
        return host.clone()

    monkeypatch.setattr(staging, "_device_view", view)
    ring = StagingRing(4 * SLOT_BYTES, CUDA)
    fill(runtime, ring.acquire(24))
    assert [call[0] for call in runtime.calls] == ["wait", "gather", "record", "wait", "record"]


def test_all_memory_is_taken_at_the_start_and_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = StagingRing(3 * SLOT_BYTES, torch.device("cpu"))
    monkeypatch.setattr(torch, "empty", None)
    slots = [ring.acquire(SLOT_BYTES) for _ in range(3)]
    assert len({id(slot) for slot in slots}) == 3
    ring.release(slots[1])
    assert ring.acquire(1) is slots[1]


def test_a_piece_larger_than_a_slot() -> None:
    ring = StagingRing(SLOT_BYTES, torch.device("cpu"))
    large = ring.acquire(SLOT_BYTES + 8)
    assert large.memory.nbytes == SLOT_BYTES + 8
    ring.release(large)
    assert ring.acquire(SLOT_BYTES + 8) is not large
    assert ring.acquire(8).memory.nbytes == SLOT_BYTES


class FakeEvent:
    """A CUDA event at a time in nanoseconds, and CUDA's arithmetic: float32 milliseconds."""

    def __init__(self, at: int) -> None:
        self.at = at

    def elapsed_time(self, end: FakeEvent) -> float:
        return float(np.float32((end.at - self.at) / 1e6))


def test_the_clock_of_a_gpu_is_as_fine_after_a_day_as_at_first() -> None:
    now, day = 5 * 10**9, 86_400 * 10**9
    clock = DeviceClock(lambda: FakeEvent(now), lambda: now)
    for at in (10**9, 59 * 10**9, day, day + 30 * 10**9, 2 * day):
        now = 5 * 10**9 + at
        happened = now - 123_456  # before the event that is made on the way, if one is
        assert abs(clock.ns(FakeEvent(happened)) - happened) < 5000
    coarse = FakeEvent(0).elapsed_time(FakeEvent(day + 123_456)) * 1e6
    assert abs(coarse - day - 123_456) > 100_000, "or it would be for nothing"
