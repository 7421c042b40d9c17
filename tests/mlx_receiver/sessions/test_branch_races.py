"""What becomes of a branch when the text that it begins like ends, is cancelled or makes room
before it is copied, meanwhile or afterwards."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from mlx_receiver.caches.joinable import JoinableKVCache
from mlx_receiver.caches.memory import Budget
from mlx_receiver.caches.model import ModelCache
from mlx_receiver.caches.plain import PlainKV
from mlx_receiver.metrics import Metrics
from mlx_receiver.sessions.earlier import NEW, Beginning, EarlierTexts
from mlx_receiver.wire.layout import full_attention

LAYOUT = full_attention(2, 1, 4, "float32")
PROMPT = list(range(1000, 1200))
FORK = [*PROMPT[:150], 1, 2, 3]
SECONDS = 0.3

Done = Callable[[list[Any] | None], None]


def caches(tokens: int) -> list[Any]:
    """What a text of so many tokens leaves."""
    rows = [mx.zeros((1, 1, 256, 4)) for _ in range(4)]
    return [JoinableKVCache.holding(rows[2 * n], rows[2 * n + 1], tokens) for n in range(2)]


class Desk:
    """Earlier texts, and one that is decoded until it ``ends``; a copy of it is what a test makes
    of ``asked``."""

    def __init__(self, total: int = 1 << 20) -> None:
        self.budget = Budget()
        cache = ModelCache(LAYOUT, [PlainKV()])
        self.texts = EarlierTexts(self.budget, Metrics())
        self.texts.configure(cache, None)
        self.budget.kept = self.texts.residents
        self.budget.configure(cache, total)
        self.reservation = self.budget.reserve(len(PROMPT), 8)
        self.keeper = self.texts.keeper("", LAYOUT, self.reservation, len(PROMPT))
        assert self.keeper is not None
        self.asked: list[tuple[int, Callable[[], bool], Done]] = []
        self.answer: Callable[[int, Done], None] = lambda _tokens, _done: None
        self.keeper.decoding(PROMPT, self._copy)

    def _copy(self, tokens: int, wanted: Callable[[], bool], done: Done) -> None:
        self.asked.append((tokens, wanted, done))
        self.answer(tokens, done)

    def end(self, keep: bool = True) -> None:
        """The text leaves the batch, and perhaps what it has."""
        assert self.keeper is not None
        if keep:
            self.keeper([*PROMPT, 7, 8], caches(202))
        self.keeper.gone()
        self.reservation.release()

    def fork(self) -> Beginning:
        found = self.texts.find("", FORK, LAYOUT, 8)
        if found.branch is None:
            return found
        return self.texts.copied("", FORK, LAYOUT, found.branch, SECONDS)

    def check(self, beginning: Beginning, held: int) -> None:
        """And nothing stays reserved beside what is kept."""
        assert beginning.held.tokens == held
        beginning.release()
        assert self.budget.reserved == self.texts.residents.nbytes
        while self.texts.residents.reclaim():
            pass
        assert self.budget.reserved == 0
        assert not len(self.texts.decoded)


@pytest.mark.parametrize("later", [False, True])
def test_it_is_copied_and_kept(later: bool) -> None:
    desk = Desk()

    def answer(tokens: int, done: Done) -> None:
        timer = threading.Timer(0.05 if later else 0, lambda: done(caches(tokens)))
        timer.start() if later else done(caches(tokens))

    desk.answer = answer
    beginning = desk.fork()
    assert beginning.held.tokens == 150 and not beginning.alone
    again = desk.fork()  # which need not be copied
    assert again.held.tokens == 150 and len(desk.asked) == 1
    again.release()
    desk.end()
    assert len(desk.texts.residents) == 1  # the whole text has what was copied
    desk.check(beginning, 150)


@pytest.mark.parametrize("keep", [True, False])
def test_the_text_ends_before_it_is_asked_for(keep: bool) -> None:
    desk = Desk()
    desk.end(keep)
    desk.check(desk.fork(), 150 if keep else 0)
    assert not desk.asked


@pytest.mark.parametrize("keep", [True, False])
def test_the_text_ends_once_it_was_found(keep: bool) -> None:
    desk = Desk()
    found = desk.texts.find("", FORK, LAYOUT, 8)
    assert found.branch is not None
    desk.end(keep)
    desk.answer = lambda _tokens, done: done(None)
    beginning = desk.texts.copied("", FORK, LAYOUT, found.branch, SECONDS)
    assert len(desk.asked) == (not keep)
    desk.check(beginning, 150 if keep else 0)


@pytest.mark.parametrize("keep", [True, False])
def test_the_text_ends_while_it_is_copied(keep: bool) -> None:
    desk = Desk()

    def answer(_tokens: int, done: Done) -> None:
        desk.end(keep)
        done(None)

    desk.answer = answer
    desk.check(desk.fork(), 150 if keep else 0)


def test_the_copy_makes_room_before_it_is_found() -> None:
    desk = Desk()

    def answer(tokens: int, done: Done) -> None:
        done(caches(tokens))
        assert desk.texts.residents.reclaim()

    desk.answer = answer
    beginning = desk.fork()
    desk.end(keep=False)
    desk.check(beginning, 0)


def test_the_whole_text_takes_its_place_while_it_is_used() -> None:
    desk = Desk()
    desk.answer = lambda tokens, done: done(caches(tokens))
    beginning = desk.fork()
    desk.end()
    assert len(desk.texts.residents) == 1
    # What was found stays until it has been copied.
    assert beginning.earlier is not None and beginning.earlier.caches
    desk.check(beginning, 150)


def test_nobody_waits_for_long_and_what_comes_late_is_kept() -> None:
    desk = Desk()
    began = time.monotonic()
    beginning = desk.fork()
    assert SECONDS <= time.monotonic() - began < SECONDS + 2
    ((tokens, wanted, done),) = desk.asked
    assert beginning is NEW and not wanted()
    done(caches(tokens))
    again = desk.fork()
    assert again.held.tokens == 150 and len(desk.asked) == 1
    desk.end(keep=False)
    desk.check(again, 150)


def test_without_room_it_is_not_asked_for() -> None:
    desk = Desk(total=2 * 2 * 4 * 4 * 256 + 64 * 200 + 1000)
    assert desk.fork() is NEW and not desk.asked
    desk.end(keep=False)
    assert desk.budget.reserved == 0


def test_a_text_that_shares_little_is_not_asked_for() -> None:
    desk = Desk()
    assert desk.texts.find("", [*PROMPT[:63], 1, 2, 3], LAYOUT, 8) is NEW
    assert desk.texts.find("", [*PROMPT[:64], 1, 2, 3], LAYOUT, 8).branch is not None
    assert desk.texts.find("another's", FORK, LAYOUT, 8) is NEW
    desk.end(keep=False)
