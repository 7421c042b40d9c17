"""Copies of what is decoded, in every order of events: each is concluded once, whole or not at
all."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from mlx_receiver.decode.copies import Copies, Copy, copy_now
from mlx_receiver.decode.jobs import Job
from mlx_receiver.wire.sampling import Sampling

LAYERS = 3


class Rows:
    """What a batch says of its rows."""

    layers = LAYERS

    def __init__(self) -> None:
        self.decoding: set[Job] = set()
        self.copied: list[tuple[int, int]] = []
        self.broken = False

    def decodes(self, job: Job) -> bool:
        return job in self.decoding

    def beginning(self, job: Job, layer: int, tokens: int) -> Any:
        assert job in self.decoding and job.keep is not None
        if self.broken:
            raise MemoryError
        self.copied.append((layer, tokens))
        return f"layer {layer}"


class Case:
    """A job that is decoded, one copy of it, and what became of that."""

    def __init__(self) -> None:
        self.copies, self.rows = Copies(), Rows()
        self.job = Job([1, 2, 3], Sampling(max_tokens=2), None)  # type: ignore[arg-type]
        self.job.keep = object()  # type: ignore[assignment]
        self.wanted = True
        self.results: list[list[Any] | None] = []
        self.copy = Copy(self.job, 2, lambda: self.wanted, self.results.append)

    def ask(self) -> None:
        self.copies.add(self.copy)

    def join(self) -> None:
        self.rows.decoding.add(self.job)

    def leave(self) -> None:
        self.rows.decoding.discard(self.job)
        self.job.keep = None

    def give_up(self) -> None:
        self.wanted = False

    def step(self) -> None:
        """What is done between two steps, where there is time for one layer."""
        if self.copies:
            self.copies.make(self.rows, 0.0)  # type: ignore[arg-type]

    def stop(self) -> None:
        self.copies.end()


WHOLE = [f"layer {n}" for n in range(LAYERS)]
ORDERS = sorted(set(itertools.permutations(["ask", "end", *["step"] * 4])))


def test_a_layer_at_a_time() -> None:
    case = Case()
    case.join()
    case.ask()
    for number in range(LAYERS):
        assert not case.results
        assert len(case.rows.copied) == number
        case.step()
    assert case.results == [WHOLE] and not case.copies
    assert case.rows.copied == [(n, 2) for n in range(LAYERS)]


def test_one_that_joins_later_is_waited_for() -> None:
    case = Case()
    case.ask()
    case.step()
    assert not case.results and case.copies
    case.join()
    for _ in range(LAYERS):
        case.step()
    assert case.results == [WHOLE]


@pytest.mark.parametrize("end", ["leave", "give_up", "stop"])
@pytest.mark.parametrize(
    "order", sorted(set(itertools.permutations(["ask", "end", *["step"] * 4])))
)
def test_whatever_ends_it_concludes_it_once(end: str, order: tuple[str, ...]) -> None:
    case = Case()
    case.join()
    for event in order:
        getattr(case, end if event == "end" else event)()
    case.step()
    steps_between = order[: order.index("end")][order.index("ask") :].count("step")
    made = order.index("ask") < order.index("end") and steps_between >= LAYERS
    assert case.results == ([WHOLE] if made else [None])
    assert not case.copies


def test_one_that_fails_harms_no_other() -> None:
    case, other = Case(), Case()
    case.join()
    case.ask()
    other.copy.job = case.job
    case.rows.broken = True
    case.step()
    assert case.results == [None] and not case.copies
    case.rows.broken = False
    case.copies.add(other.copy)
    for _ in range(LAYERS):
        case.step()
    assert other.results == [WHOLE]


def test_whoever_fails_at_the_end_of_one_harms_no_other() -> None:
    case, other = Case(), Case()
    case.join()

    def fail(_: Any) -> None:
        raise RuntimeError

    case.copy.done = fail
    case.ask()
    other.copy.job = case.job
    case.copies.add(other.copy)
    for _ in range(2 * LAYERS):
        case.step()
    assert other.results == [WHOLE] and not case.copies


@pytest.mark.parametrize("decoded", [False, True])
def test_at_once_or_not(decoded: bool) -> None:
    case = Case()
    if decoded:
        case.join()
    copy_now(case.copy, case.rows)  # type: ignore[arg-type]
    assert case.results == [WHOLE if decoded else None]
