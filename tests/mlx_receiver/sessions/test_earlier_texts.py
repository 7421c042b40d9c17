"""What texts leave, by itself: which is found, and what it does to the memory budget."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from mlx_receiver.caches.adapter import resuming
from mlx_receiver.caches.memory import Budget
from mlx_receiver.caches.model import ModelCache
from mlx_receiver.caches.plain import PlainKV
from mlx_receiver.metrics import Metrics
from mlx_receiver.sessions.residents import Found, Residents
from mlx_receiver.wire.layout import full_attention
from mlx_receiver.wire.messages import WireError

LAYOUT = full_attention(2, 1, 4, "float32")


class Cache:
    nbytes = 64


@pytest.fixture
def budget() -> Budget:
    made = Budget()
    made.configure(ModelCache(LAYOUT, [PlainKV()]), 1 << 20)
    made.kept = Residents(Metrics())
    return made


def added(
    budget: Budget,
    tokens: list[int],
    partition: str = "",
    asked: int = 0,
    found: Found | None = None,
) -> None:
    residents = budget.kept
    assert isinstance(residents, Residents)
    reservation = budget.reserve(len(tokens), 0)
    nbytes = reservation.nbytes - 4 * len(tokens)
    continued = found.resident.number if found is not None else 0
    residents.add(partition, tokens, [Cache()], nbytes, reservation, asked, continued)
    reservation.release()


def test_the_longest_beginning_is_found(budget: Budget) -> None:
    residents = budget.kept
    assert isinstance(residents, Residents)
    base = list(range(100, 140))
    added(budget, [*base, 1, 2])
    added(budget, [*base, *range(50), 3])
    added(budget, [*base, *range(60)], "another")
    found = residents.find("", [*base, *range(55)], lambda _: True)
    assert found is not None and (found.tokens, found.alone) == (90, False)
    found.release()
    assert residents.find("", base[:10], lambda _: True) is None  # too little to be worth it
    assert residents.find("nobody's", base, lambda _: True) is None


def test_one_continues_in_its_memory_and_others_beside_it(budget: Budget) -> None:
    residents = budget.kept
    assert isinstance(residents, Residents)
    text = list(range(100, 140))
    added(budget, text)
    first = residents.find("", [*text, 1], lambda _: True)
    second = residents.find("", [*text, 2], lambda _: True)
    assert first is not None and second is not None
    assert (first.alone, second.alone) == (True, False)
    first.release()
    first.release()
    third = residents.find("", [*text, 3], lambda _: True)
    assert third is not None and third.alone
    mine = budget.reserve(50, 0, there=third.resident.nbytes)
    kept = third.resident.nbytes
    residents.take(third, mine)
    # While the second one copies from it, MLX cannot write into that memory.
    assert len(residents) == 0 and budget.reserved == mine.nbytes + kept
    second.release()
    assert budget.reserved == mine.nbytes
    mine.release()
    assert budget.reserved == 0


def test_the_next_turn_may_come_before_the_cache_is_kept(
    budget: Budget, monkeypatch: pytest.MonkeyPatch
) -> None:
    residents = budget.kept
    assert isinstance(residents, Residents)
    monkeypatch.setattr("mlx_receiver.sessions.residents._PATIENCE", 60.0)
    text = list(range(100, 140))
    residents.expect("", 1)

    def keep() -> None:
        added(budget, text)
        residents.expect("", -1)

    later = threading.Timer(0.05, keep)
    later.start()
    found = residents.find("", [*text, 1], lambda _: True)
    assert found is not None and found.tokens == 40
    later.join()
    residents.expect("another's", 1)
    began = time.monotonic()
    assert residents.find("", [*text, 1], lambda _: True) is not None
    assert residents.find("nobody's", text, lambda _: True) is None
    assert time.monotonic() - began < 30


def test_what_is_in_use_makes_no_room(budget: Budget) -> None:
    residents = budget.kept
    assert isinstance(residents, Residents)
    text = list(range(100, 140))
    added(budget, text)
    added(budget, list(range(500, 540)))
    found = residents.find("", text, lambda _: False)
    assert found is not None
    assert residents.nbytes == found.resident.nbytes  # the other one's
    assert residents.reclaim() and not residents.reclaim()
    found.release()
    assert residents.nbytes == found.resident.nbytes and residents.reclaim()
    assert (residents.nbytes, budget.reserved) == (0, 0)


def test_no_room_is_made_for_what_never_fits(budget: Budget) -> None:
    residents = budget.kept
    assert isinstance(residents, Residents)
    for start in range(0, 1000, 100):
        added(budget, list(range(start, start + 40)))
    with pytest.raises(WireError, match="MiB are free"):
        budget.reserve(1 << 20, 0)
    assert len(residents) == 10
    most = budget.reserve(8000, 0)
    assert len(residents) < 10
    most.release()
    residents.close()
    assert budget.reserved == 0


def test_how_a_turn_ends_may_be_written_in_another_way(budget: Budget) -> None:
    residents = budget.kept
    assert isinstance(residents, Residents)
    text = list(range(1000, 1400))
    added(budget, [*text, 5, 6])
    added(budget, [*text, 7, 8, 9])
    assert len(residents) == 1
    added(budget, [*range(2000, 2040)])
    assert len(residents) == 2  # another conversation, however short


def test_who_allocates_in_another_way_is_sent_whole_prompts() -> None:
    class Other(PlainKV):
        kind = "other"

        def allocate(self, layer: Any, tokens: int, headroom: int) -> Any: ...

    class Both(Other):
        def resume(self, layer: Any, before: Any, tokens: int, headroom: int) -> Any: ...

    found = {made: resuming(made()) is not None for made in (PlainKV, Other, Both)}
    assert found == {PlainKV: True, Other: False, Both: True}


@pytest.mark.parametrize(
    ("answer", "asked", "texts"), [(500, 8000, 1), (600, 8000, 2), (500, 8200, 2)]
)
def test_an_answer_without_its_reasoning_takes_the_place_of_it(
    budget: Budget, answer: int, asked: int, texts: int
) -> None:
    """What was asked may be another branch, to which somebody comes back, and so may a long one."""
    residents = budget.kept
    assert isinstance(residents, Residents)
    budget.total = 8 << 20
    text = list(range(8000))
    added(budget, [*text, *range(9000, 9000 + answer)], asked=asked)
    edited = [*text, *range(9100, 9000 + answer), 7, 8, 9]
    found = residents.find("", edited, lambda _: True)
    assert found is not None and not found.alone
    added(budget, edited, asked=len(edited) - 3, found=found)
    found.release()
    assert len(residents) == texts
    # Two that were made from none, or from another one, leave each other be.
    added(budget, [*text[:5000], *range(9000, 9000 + answer)], asked=5000)
    added(budget, [*text[:5000], 1, 2, 3], asked=5000)
    assert len(residents) == texts + 2
