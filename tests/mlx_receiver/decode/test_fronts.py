"""Fronts take turns: each has a chunk computed in the order in which it came, whoever waits for
something else keeps nobody waiting, and each chunk is as long as the time that is left."""

from __future__ import annotations

import itertools
import time
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from mlx_receiver.decode import fronts as module
from mlx_receiver.decode.fronts import CHUNK_SECONDS, LEAST_CHUNK, MOST_ROWS, Chunk, Fronts
from mlx_receiver.wire.messages import E_CAPACITY, WireError

LOADED: Any = SimpleNamespace(model=lambda tokens, cache: None)


class Prompt:
    """A front of so many tokens; ``events`` says what becomes of the next turns, "go" behind
    them."""

    def __init__(self, log: list[str], name: str, tokens: int, *events: str) -> None:
        self.log, self.name, self.left, self.events = log, name, tokens, list(events)
        self.wanted, self.closed = True, 0
        self.asked: list[int] = []
        self.may_take: list[float] = []

    def next(self, most: int, rate: float, seconds: float) -> Chunk | None:
        self.asked.append(most)
        self.may_take.append(seconds)
        event = self.events.pop(0) if self.events else "go"
        if event == "wait":
            return Chunk([], [])
        if event == "copies":  # as long as it may
            time.sleep(seconds)
            return Chunk([], [])
        if event == "full":
            raise WireError(E_CAPACITY, "no room")
        if event == "fails":
            raise RuntimeError("out of memory")
        return Chunk([1] * min(most, self.left), [SimpleNamespace(state=mx.array(0))]) if (
            self.left
        ) else None  # fmt: skip

    def computed(self, tokens: int) -> None:
        self.log.append(self.name)
        self.left -= tokens

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def fronts(monkeypatch: pytest.MonkeyPatch) -> Fronts:
    monkeypatch.setattr(module, "FIRST_CHUNK", 16)
    monkeypatch.setattr(module, "LONGEST_CHUNK", 16)
    made = Fronts()
    made._chunk = 16
    return made


def turns(fronts: Fronts, count: int) -> None:
    for _ in range(count):
        fronts.compute(LOADED, 0)


@pytest.mark.parametrize("order", list(itertools.permutations("abc")))
def test_in_the_order_in_which_they_came(fronts: Fronts, order: tuple[str, ...]) -> None:
    log: list[str] = []
    made = {name: Prompt(log, name, 16 * (1 + index)) for index, name in enumerate("abc")}
    for name in order:
        fronts.add(made[name])
    turns(fronts, 6 + 3)
    assert "".join(log[:3]) == "".join(order)
    assert [log.count(name) for name in "abc"] == [1, 2, 3]
    # Nobody has two chunks while somebody else has had one less and waits.
    for at in range(1, len(log) + 1):
        done = {name: log[:at].count(name) for name in "abc"}
        waiting = [done[name] for name in "abc" if done[name] < 1 + "abc".index(name)]
        assert not waiting or max(done.values()) - min(waiting) <= 1
    assert not fronts and all(prompt.closed == 1 for prompt in made.values())


@pytest.mark.parametrize("at", range(3))
@pytest.mark.parametrize("event", ["wait", "full", "fails"])
def test_whoever_cannot_go_on_keeps_nobody_waiting(fronts: Fronts, at: int, event: str) -> None:
    log: list[str] = []
    prompts = [
        Prompt(log, name, 48, *([event] * 3 if index == at else [])) for index, name in
        enumerate("abc")
    ]  # fmt: skip
    for prompt in prompts:
        fronts.add(prompt)
    turns(fronts, 2)
    others = [prompt.name for index, prompt in enumerate(prompts) if index != at]
    assert sorted(log) == others, "each turn computes something"
    turns(fronts, 1)
    assert prompts[at].closed == (event != "wait")
    turns(fronts, 20)
    assert log.count(prompts[at].name) == (3 if event == "wait" else 0)
    assert not fronts and all(prompt.closed == 1 for prompt in prompts)


def test_whoever_copies_has_had_its_turn(fronts: Fronts) -> None:
    """What is copied before a chunk takes the time of one."""
    log: list[str] = []
    first, second = Prompt(log, "a", 32, "copies"), Prompt(log, "b", 32)
    fronts.add(first)
    fronts.add(second)
    assert fronts.compute(LOADED, 1, 0.02)
    assert not log and (first.may_take, second.may_take) == ([0.02], [])
    turns(fronts, 2)
    assert log == ["b", "a"]


def test_those_that_all_wait(fronts: Fronts) -> None:
    log: list[str] = []
    fronts.add(Prompt(log, "a", 16, "wait"))
    fronts.add(Prompt(log, "b", 16, "wait"))
    assert not fronts.compute(LOADED, 0)
    assert fronts.compute(LOADED, 0) and log == ["a"]


@pytest.mark.parametrize("when", range(4))
def test_it_ends_at_any_time(fronts: Fronts, when: int) -> None:
    log: list[str] = []
    prompts = [Prompt(log, name, 32) for name in "ab"]
    for prompt in prompts:
        fronts.add(prompt)
    turns(fronts, when)
    prompts[0].wanted = False
    fronts.drop_unwanted()
    fronts.end()
    late = Prompt(log, "late", 16)
    fronts.add(late)
    turns(fronts, 2)
    assert len(log) == when and [prompt.closed for prompt in [*prompts, late]] == [1, 1, 1]


def test_a_chunk_is_as_long_as_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    made, log = Fronts(), list[str]()
    prompt = Prompt(log, "a", 10**6)
    made.add(prompt)
    made._waiting[0].chunk = 1000
    assert not made.compute(LOADED, MOST_ROWS + 1, CHUNK_SECONDS) and not prompt.asked
    made.compute(LOADED, 1, CHUNK_SECONDS / 2)
    made._waiting[0].chunk = 1000
    made.compute(LOADED, 1, 0.0)
    assert prompt.asked == [500, LEAST_CHUNK]


def test_each_has_a_speed_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a long beginning a chunk takes longer: others' are not shorter for it."""
    made, log, clock = Fronts(), list[str](), SimpleNamespace(now=0.0)
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock.now)
    slow, quick = Prompt(log, "slow", 10**6), Prompt(log, "quick", 10**6)
    made.add(slow)
    made.add(quick)

    def model(tokens: Any, cache: Any) -> None:
        # Whose turn it is, is last in line.
        clock.now += tokens.size * (2e-3 if made._waiting[-1].front is slow else 1e-6)

    loaded: Any = SimpleNamespace(model=model)
    for _ in range(16):
        made.compute(loaded, 0)
    assert slow.asked[-1] <= 90 < 1024 <= quick.asked[-1]
