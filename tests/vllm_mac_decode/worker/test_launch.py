"""When a step's layers are passed on for export. A GPU's events are stood for by ``Gpu``."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from vllm_mac_decode.worker.launch import LaunchGate

LAYERS = 32


class Gpu:
    """Needs ``per_launch`` times as long for a layer as launching one takes."""

    def __init__(self, per_launch: float) -> None:
        self._per_launch = per_launch
        self.launched = 0

    def has_written(self, layer: int) -> bool:
        return self.launched > (layer + 1) * self._per_launch


@dataclass
class Event:
    gpu: Gpu
    layer: int

    def query(self) -> bool:
        return self.gpu.has_written(self.layer)


@dataclass
class Layer:
    index: int
    written: Event | None


def passed_on(per_launch: float | None) -> list[tuple[int, int]]:
    """(layer, layers launched when it was passed on) of one step; None: there is no GPU."""
    gpu = Gpu(per_launch or 0)
    seen: list[tuple[int, int]] = []
    gate = LaunchGate[Layer](lambda layer: seen.append((layer.index, gpu.launched)))
    gate.begin()
    for index in range(LAYERS):
        gpu.launched = index + 1
        gate.add(Layer(index, None if per_launch is None else Event(gpu, index)))
    gate.end()
    assert [layer for layer, _ in seen] == list(range(LAYERS))
    return seen


def test_without_a_gpu_every_layer_goes_at_once() -> None:
    assert all(launched == layer + 1 for layer, launched in passed_on(None))


@pytest.mark.parametrize("per_launch", [0.5, 1, 1.7])
def test_a_gpu_that_keeps_up_has_the_whole_step_launched_first(per_launch: float) -> None:
    assert all(launched == LAYERS for _, launched in passed_on(per_launch))


@pytest.mark.parametrize("per_launch", [6, 13, 90])
def test_a_gpu_that_is_far_behind_is_not_waited_for(per_launch: float) -> None:
    assert all(launched <= max(layer + 1, 6) for layer, launched in passed_on(per_launch))


def test_a_step_that_was_never_ended_is_not_lost() -> None:
    seen: list[int] = []
    gate = LaunchGate[Layer](lambda layer: seen.append(layer.index))
    gate.begin()
    gate.add(Layer(0, Event(Gpu(1), 0)))
    assert seen == []
    gate.begin()
    assert seen == [0]
