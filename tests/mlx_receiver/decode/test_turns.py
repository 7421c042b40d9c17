"""Copies, fronts and prompts share the time between two steps: whatever they want, in every order,
running responses wait for one budget, and none of the three starves."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest

from mlx_receiver.decode.turns import GAP_SECONDS, Turns

#: In the order in which they are done.
ALL = ("copies", "fronts", "prompts")
ORDERS = list(itertools.permutations(ALL))


class Worker:
    """Somebody who wants some of each gap. What it does comes in units."""

    def __init__(self, unit: float, least: bool = False, wants: float = 1e9) -> None:
        """``wants``: seconds, altogether; ``least``: a unit of it is done in any case."""
        self.unit, self.wants, self.least = unit, wants, least
        self.did = 0.0
        self.gaps: list[float] = []

    def work(self, seconds: float) -> float:
        units = max(1, int(seconds / self.unit)) if seconds > 0 or self.least else 0
        took = min(units * self.unit, self.wants - self.did)
        self.did += took
        self.gaps.append(took)
        return took


def run(workers: dict[str, Worker], gaps: int, order: Sequence[str] = ALL) -> list[float]:
    """So many gaps; the seconds of each."""
    turns, waited = Turns(), []
    for _ in range(gaps):
        wanting = [who for who in order if who in workers and workers[who].did < workers[who].wants]
        turns.begin(wanting, decoding=True)
        used = 0.0
        for who in wanting:
            if (seconds := turns.seconds(who)) or workers[who].least:
                used += (took := workers[who].work(seconds))
                turns.took(who, took)
            else:
                workers[who].gaps.append(0.0)
        waited.append(used)
    return waited


@pytest.mark.parametrize("order", ORDERS)
def test_one_budget_in_equal_parts(order: tuple[str, ...]) -> None:
    workers = {who: Worker(0.001) for who in ALL}
    assert max(run(workers, 100, order)) <= GAP_SECONDS + 1e-9
    for worker in workers.values():
        assert worker.did == pytest.approx(100 * GAP_SECONDS / 3, rel=0.05)


@pytest.mark.parametrize("who", ALL)
def test_one_alone_has_all_of_it(who: str) -> None:
    assert run({who: Worker(0.001)}, 10) == pytest.approx([GAP_SECONDS] * 10, rel=0.01)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("long", ALL)
@pytest.mark.parametrize("unit", [0.06, 0.1, 0.14, 0.4])
def test_what_cannot_be_divided_is_paid_for(order: tuple[str, ...], long: str, unit: float) -> None:
    """One takes longer than its part each time: the others get theirs, and no gap has more than
    that one unit beyond the budget."""
    workers = {who: Worker(unit if who == long else 0.001) for who in ALL}
    gaps = run(workers, 300, order)
    assert max(gaps) <= GAP_SECONDS + unit
    assert workers[long].did, "it does not starve either"
    for who in set(ALL) - {long}:
        assert workers[who].did >= 0.9 * 300 * GAP_SECONDS / 3
        waits = [len(list(same)) for took, same in itertools.groupby(workers[who].gaps) if not took]
        assert max(waits, default=0) <= 3


@pytest.mark.parametrize("order", ORDERS)
def test_all_of_them_are_long(order: tuple[str, ...]) -> None:
    workers = {who: Worker(0.1) for who in ALL}
    gaps = run(workers, 300, order)
    assert max(gaps) < GAP_SECONDS + 0.1
    assert sum(gaps) <= 300 * GAP_SECONDS * 1.05
    did = [worker.did for worker in workers.values()]
    assert min(did) > 0.8 * max(did)


def test_prompts_go_on_in_any_case() -> None:
    """A step prefills the shortest chunk at least, and pays for it."""
    workers = {"fronts": Worker(0.001), "prompts": Worker(0.2, least=True)}
    run(workers, 100)
    assert workers["prompts"].did == pytest.approx(20)
    assert workers["fronts"].did >= 0.9 * 100 * GAP_SECONDS / 2


@pytest.mark.parametrize("idle", ["copies", "fronts"])
def test_what_one_does_not_use_is_for_others(idle: str) -> None:
    """A front may wait for KV, for instance."""
    workers = {who: Worker(0.001) for who in ALL}
    workers[idle].work = lambda _seconds: workers[idle].gaps.append(0.0) or 0.0  # type: ignore[func-returns-value, method-assign]
    gaps = run(workers, 100)
    assert sum(gaps) == pytest.approx(100 * GAP_SECONDS, rel=0.05)
    assert max(gaps) <= GAP_SECONDS + 1e-9
    for who in set(ALL) - {idle}:
        assert workers[who].did >= 0.9 * 100 * GAP_SECONDS / 3


def test_one_that_waited_long_does_not_take_two_gaps() -> None:
    turns = Turns()
    for _ in range(50):  # nothing is ever used
        turns.begin(ALL, decoding=True)
    granted = {}
    for who in ALL:
        granted[who] = turns.seconds(who)
        turns.took(who, granted[who])
    assert sum(granted.values()) == pytest.approx(GAP_SECONDS)


def test_who_comes_later_gets_what_is_left() -> None:
    turns = Turns()
    turns.begin(["copies"], decoding=True)
    assert turns.seconds("joins") == 0.0, "it is granted"
    turns.took("copies", 0.1)
    assert turns.seconds("joins") == pytest.approx(0.05)
    turns.took("joins", 0.04)
    assert turns.seconds("prompts") == pytest.approx(0.01)
    turns.took("prompts", 1.0)
    assert turns.seconds("joins") == 0.0


def test_nobody_waits_where_nothing_is_decoded() -> None:
    turns = Turns()
    for decoding in (True, False):
        turns.begin(ALL, decoding)
        for who in ALL:
            assert (turns.seconds(who) == GAP_SECONDS) is not decoding
            turns.took(who, 5.0)
    turns.begin(ALL, decoding=True)
    assert all(turns.seconds(who) for who in ALL), "what was done meanwhile is no debt"


@pytest.mark.parametrize("seed", range(20))
def test_whatever_comes_and_goes(seed: int) -> None:
    """Each that keeps wanting gets something of any few gaps, and all stay within the budget but
    for a unit of each that has just had one."""
    rng = random.Random(seed)
    turns, units = Turns(), {who: rng.choice([0.001, 0.02, 0.07, 0.2]) for who in ALL}
    waited = dict.fromkeys(ALL, 0)
    total, gaps = 0.0, 400
    wanting: list[str] = list(ALL)
    for _ in range(gaps):
        if rng.random() < 0.1:
            wanting = rng.sample(ALL, rng.randint(1, 3))
        turns.begin(wanting, decoding=True)
        used = 0.0
        for who in ALL:
            if who not in wanting:
                waited[who] = 0
                continue
            seconds = turns.seconds(who)
            assert 0 <= seconds <= GAP_SECONDS - min(used, GAP_SECONDS) + 1e-9
            waited[who] = 0 if seconds else waited[who] + 1
            assert waited[who] <= 12
            if seconds:
                took = max(1, int(seconds / units[who])) * units[who]
                turns.took(who, took)
                used += took
        total += used
    assert total <= gaps * GAP_SECONDS * 1.6


@pytest.mark.parametrize("first", ALL)
def test_who_has_waited_for_most_comes_first(first: str) -> None:
    turns = Turns()
    turns._balance = {who: 0.14 if who == first else 0.05 for who in ALL}
    turns.begin(ALL, decoding=True)
    assert [who for who in ALL if turns.seconds(who)] == [first]
    assert turns.seconds(first) == pytest.approx(GAP_SECONDS)
