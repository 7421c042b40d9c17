"""What is computed and what arrives meet in one session's memory: every order, cell by cell."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from mlx_receiver.caches.model import ModelCache
from mlx_receiver.caches.plain import PlainKV
from mlx_receiver.metrics import Metrics
from mlx_receiver.sessions.coverage import COMPUTED, Coverage
from mlx_receiver.sessions.session import Phase, Session
from mlx_receiver.sessions.store import SessionStore
from mlx_receiver.wire.frames import Header, Kind
from mlx_receiver.wire.layout import Held, full_attention
from mlx_receiver.wire.messages import E_BLOCK, Open, WireError
from mlx_receiver.wire.sampling import Sampling
from tests.waiting import eventually

LAYERS, HEADS, DIM, TOKENS = 2, 2, 4, 32
LAYOUT = full_attention(LAYERS, HEADS, DIM, "float32")
NEED = LAYOUT.nbytes(TOKENS)
#: A row's first number: whose it is.
CAME, MADE = 1, 2


class Owner:
    id = "owner"

    def __init__(self) -> None:
        self.completed: list[int] = []

    def opened(self, session: Session) -> None: ...

    def complete(self, session: Session) -> None:
        self.completed.append(session.id)

    def failed(self, session: Session, code: str, reason: str) -> None: ...


@pytest.fixture
def session() -> Iterator[Session]:
    owner = Owner()
    store = SessionStore(max_sessions=4, events=owner, metrics=Metrics(), keeps=False)
    store.configure(ModelCache(LAYOUT, [PlainKV()]), 1 << 24)
    opened = Open(1, "r", [1] * TOKENS, Sampling(max_tokens=4), compute="front")
    made = store.open(opened, owner, LAYOUT)
    assert eventually(lambda: made.allocated and made.timeline.allocated_ns > 0)
    yield made
    store.end(made, "done")
    assert eventually(lambda: store.budget.reserved == 0)
    store.close()


class Block:
    """One that comes, in the two steps that a data thread makes."""

    def __init__(self, session: Session, layer: int, start: int, end: int, salt: int = 0) -> None:
        self.session = session
        self.header = Header(
            Kind.BLOCK, session.id, HEADS * (end - start) * DIM * 4, layer, 0, "float32",
            0, HEADS, DIM, start, end - start,
        )  # fmt: skip
        self.bytes = np.full((HEADS, end - start, DIM), CAME + salt, np.uint32)
        self.landing: Any = None

    def lands(self) -> None:
        self.landing = self.session.landing(self.header)
        data, at = memoryview(self.bytes).cast("B"), 0
        for buffer in self.landing.buffers:
            buffer[:] = data[at : at + buffer.nbytes]
            at += buffer.nbytes

    def commits(self) -> None:
        self.landing.commit()

    def aborts(self) -> None:
        self.landing.abort()


class Rows:
    """What was computed; ``meanwhile`` is called while it is copied."""

    def __init__(self, start: int, end: int, meanwhile: Callable[[], None] = lambda: None) -> None:
        self._rows = np.full((HEADS, end - start, DIM), MADE, np.uint32)
        self._meanwhile = meanwhile

    def __getitem__(self, layer: int) -> list[np.ndarray]:
        meanwhile, self._meanwhile = self._meanwhile, lambda: None
        meanwhile()
        return [self._rows, self._rows]


def put(session: Session, start: int, end: int, meanwhile: Callable[[], None]) -> None:
    session.put(start, end, Rows(start, end, meanwhile))  # type: ignore[arg-type]


def finish(session: Session, layer: int = 0) -> None:
    """Everything else comes; what is there then is what was counted."""
    for at, start in itertools.product(range(LAYERS), range(0, TOKENS, 4)):
        for part in range(2):
            block = Block(session, at, start, start + 4)
            object.__setattr__(block.header, "part", part)
            block.lands()
            block.commits()
    assert session.complete and not session.missing()
    assert session.kv_bytes + session.computed_bytes == NEED
    buffers = session._buffers
    assert buffers is not None
    made = 0
    for at, part in itertools.product(range(LAYERS), range(2)):
        cells = buffers.part(at, part)[:, :TOKENS]
        assert ((cells == CAME) | (cells == MADE)).all() and (cells == cells[..., :1]).all()
        made += int((cells[..., 0] == MADE).sum())
    assert made * DIM * 4 == session.computed_bytes


WHEN = ("before", "meanwhile", "after")


@pytest.mark.parametrize("ends", ["commits", "aborts"])
@pytest.mark.parametrize(
    ("begin", "end"), [(a, b) for a in WHEN for b in WHEN if WHEN.index(a) <= WHEN.index(b)]
)
def test_a_block_that_overlaps(session: Session, begin: str, end: str, ends: str) -> None:
    """Tokens 8 to 24 come and 0 to 16 are computed."""
    block = Block(session, 0, 8, 24)
    threads: list[threading.Thread] = []

    def happens(now: str) -> None:
        if begin == now:
            block.lands()
        if end == now:
            # A block of tokens that are being copied waits for that.
            threads.append(threading.Thread(target=getattr(block, ends)))
            threads[-1].start()
            if now != "meanwhile" or begin == "before":
                threads[-1].join()

    happens("before")
    put(session, 0, 16, lambda: happens("meanwhile"))
    happens("after")
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()
    a_cell = DIM * 4
    first = begin == "before"
    if ends == "commits":
        assert session.kv_bytes == HEADS * (16 if first else 8) * a_cell
    came = HEADS * 8 if first and not (ends == "aborts" and end == "before") else 0
    assert session.computed_bytes == (2 * LAYERS * HEADS * 16 - came) * a_cell
    finish(session)


@pytest.mark.parametrize("when", WHEN)
def test_it_ends(session: Session, when: str) -> None:
    def happens(now: str) -> None:
        if now == when:
            assert session.end("cancelled")

    happens("before")
    put(session, 0, 16, lambda: happens("meanwhile"))
    happens("after")
    assert session.phase is Phase.ENDED and session.gap(0, 99) is None
    assert bool(session.computed_bytes) is (when == "after")


def test_copying_that_fails_leaves_a_hole(session: Session) -> None:
    def fail() -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        put(session, 0, 16, fail)
    assert session.gap(0, 99) == (0, TOKENS) and not session.computed_bytes
    finish(session)


def test_it_completes_by_either(session: Session) -> None:
    put(session, 0, TOKENS, lambda: None)
    assert session.complete and session.computed_bytes == NEED
    assert session.completed() and not session.completed()
    # What comes later is not looked at, whatever it is.
    late = Block(session, 1, 3, 9, salt=5)
    late.lands()
    late.commits()
    assert session.kv_bytes == 0


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("told", [True, False])
def test_the_rest_comes(session: Session, when: str, told: bool) -> None:
    """All that is missing comes before, while or after something is computed, and nobody has said
    yet that it is complete."""
    session._told = told

    def happens(now: str) -> None:
        if now != when:
            return
        for at, part in itertools.product(range(LAYERS), range(2)):
            # What is being copied just now cannot come: a block of that waits.
            block = Block(session, at, 16 if now == "meanwhile" else 0, TOKENS)
            object.__setattr__(block.header, "part", part)
            block.lands()
            block.commits()

    happens("before")
    put(session, 0, 16, lambda: happens("meanwhile"))
    happens("after")
    assert session.complete and session.gap(0, 99) is None
    put(session, 0, 16, lambda: None)
    assert session.computed_bytes == (0 if when == "before" else NEED // 2)
    assert session.kv_bytes + session.computed_bytes == NEED
    assert session.completed() is told
    put(session, 16, TOKENS, lambda: None)


def test_what_came_twice_is_compared_still(session: Session) -> None:
    put(session, 0, 8, lambda: None)
    block, other = Block(session, 0, 4, 12), Block(session, 0, 4, 12, salt=5)
    block.lands()
    block.commits()
    other.lands()
    with pytest.raises(WireError, match="head 0, token 8") as failure:
        other.commits()
    assert failure.value.code == E_BLOCK


def test_the_gap() -> None:
    held = Held(5)
    coverage = Coverage(LAYOUT, TOKENS, held)
    assert coverage.gap(0, 4) == (5, 9)
    assert coverage.gap(7, 400) == (7, TOKENS)
    coverage.computed(coverage.claim(5, 9))
    assert coverage.gap(0, 400) == (9, TOKENS)
    # A token is missing as long as one of its rows is, and so is what is still arriving.
    claims = coverage.claim(12, 20)
    assert coverage.gap(9, 400) == (9, TOKENS)
    coverage.computed(claims)
    assert coverage.gap(9, 400) == (9, 12) and coverage.gap(12, 400) == (20, TOKENS)
    coverage.at(Header(Kind.BLOCK, 1, 0, 1, 1, "float32", 1, 1, DIM, 9, 1))[...] = COMPUTED
    assert coverage.gap(9, 400) == (9, 12)
    coverage.computed([*coverage.claim(9, 12)])
    assert coverage.gap(0, 400) == (20, TOKENS)
    coverage.computed(coverage.claim(20, TOKENS))
    assert coverage.gap(0, 400) == (TOKENS, TOKENS)
