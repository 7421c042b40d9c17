"""Where blocks land: memory that grows layer by layer, and the staging of a CUDA receiver.

There is no GPU here: ``LateDriver`` stands for its copy engine, and copies as late as it may.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from mlx_receiver.caches import plain as cache
from mlx_receiver.caches.cuda_staging import Staging
from mlx_receiver.caches.memory import Budget
from mlx_receiver.caches.model import CacheBuffers, ModelCache
from mlx_receiver.caches.plain import PlainKV
from mlx_receiver.sessions.session import Session
from mlx_receiver.wire.frames import Header, Kind
from mlx_receiver.wire.layout import full_attention
from mlx_receiver.wire.messages import Open, WireError
from mlx_receiver.wire.sampling import Sampling

LAYERS, HEADS, TOKENS, DIM = 3, 2, 5, 4
LAYOUT = full_attention(LAYERS, HEADS, DIM, "float32")
MODEL = ModelCache(LAYOUT, [PlainKV()])


class LateDriver:
    """Copies nothing before it is waited for, and keeps no memory alive."""

    def __init__(self) -> None:
        self.queued: list[tuple[Any, NDArray[np.uint8], weakref.ref[NDArray[Any]]]] = []

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        return np.empty(nbytes, np.uint8)

    def event(self) -> Any:
        return object()

    def copy_rows(self, source: NDArray[np.uint8], target: NDArray[Any], done: Any) -> None:
        self.queued.append((done, source, weakref.ref(target)))

    def wait(self, done: Any) -> None:
        """Copies run in order: up to the last one that has this mark."""
        marks = [mark for mark, _, _ in self.queued]
        until = len(marks) - marks[::-1].index(done) if done in marks else 0
        for _, source, alive in self.queued[:until]:
            target = alive()
            assert target is not None, "the memory belongs to somebody else by now"
            target[...] = source.view(target.dtype).reshape(target.shape)
        del self.queued[:until]


@pytest.fixture
def driver() -> LateDriver:
    return LateDriver()


@pytest.fixture
def staged(driver: LateDriver, monkeypatch: pytest.MonkeyPatch) -> Iterator[LateDriver]:
    staging = Staging(driver, slots=2, slot_bytes=HEADS * TOKENS * DIM * 4)
    monkeypatch.setattr(cache, "staging", lambda: staging)
    yield driver


def session(buffers: CacheBuffers) -> Session:
    opened = Open(7, "r", list(range(TOKENS)), Sampling(max_tokens=9))
    budget = Budget()
    budget.configure(MODEL, 1 << 20)
    reservation = budget.reserve(TOKENS, 9, extra=LAYOUT.cells(TOKENS))
    made = Session(opened, None, LAYOUT, reservation)
    assert made.give_memory(buffers)
    return made


def buffers(grown: bool = True) -> CacheBuffers:
    made = MODEL.allocate(LAYOUT, TOKENS, 1)
    while grown and made.grow():
        pass
    return made


def block(layer: int, part: int, start: int = 0, tokens: int = TOKENS) -> Header:
    return Header(
        kind=Kind.BLOCK, session=7, payload_bytes=HEADS * tokens * DIM * 4, layer=layer,
        part=part, dtype="float32", head_start=0, heads=HEADS, width=DIM,
        token_start=start, tokens=tokens,
    )  # fmt: skip


def values(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((HEADS, TOKENS, DIM)).astype(np.float32)


def land(into: Session, header: Header, data: NDArray[np.float32], commit: bool = True) -> None:
    landing = into.landing(header)
    payload = memoryview(np.ascontiguousarray(data)).cast("B")
    for buffer in landing.buffers:
        buffer[:] = payload[: buffer.nbytes]
        payload = payload[buffer.nbytes :]
    assert not payload.nbytes
    del buffer
    (landing.commit if commit else landing.abort)()


@pytest.mark.parametrize("with_staging", [False, True])
def test_every_block_is_where_it_belongs(
    with_staging: bool, driver: LateDriver, request: pytest.FixtureRequest
) -> None:
    if with_staging:
        request.getfixturevalue("staged")
    made = session(buffers())
    for layer in range(LAYERS):
        for plane in range(2):
            data = values(10 * layer + plane)
            # Two blocks each, the later one first; and one that breaks off in between.
            land(made, block(layer, plane, 2, 3), data[:, 2:])
            land(made, block(layer, plane, 0, 2), data[:, :2] + 1, commit=False)
            land(made, block(layer, plane, 0, 2), data[:, :2])
    assert made.complete
    caches = made.take_memory().build()
    assert not driver.queued
    for layer, built in enumerate(caches):
        for plane, array in ((0, built.keys), (1, built.values)):
            got = np.array(array)[0, :, :TOKENS]
            np.testing.assert_array_equal(got, values(10 * layer + plane))


def test_a_block_that_finds_every_buffer_in_use_lands_in_the_cache_itself(
    staged: LateDriver,
) -> None:
    made = session(buffers())
    landings = [made.landing(block(layer, 0)) for layer in range(LAYERS)]
    assert [len(landing.buffers) for landing in landings] == [1, 1, HEADS]
    for landing in landings:
        for buffer in landing.buffers:
            buffer[:] = bytes(buffer.nbytes)
        landing.commit()
    assert len(staged.queued) == 2


def test_memory_of_an_ended_session_is_held_while_it_is_written(staged: LateDriver) -> None:
    made = session(buffers())
    land(made, block(0, 0), values(1))
    made.end("cancelled")
    gc.collect()
    ((done, _, target),) = staged.queued
    staged.wait(done)
    assert target() is not None, "until the slot is used again"


def test_a_finished_cache_has_no_other_owner(staged: LateDriver) -> None:
    memory = buffers()
    made = session(memory)
    land(made, block(0, 0), values(1))
    ((_, _, target),) = staged.queued
    memory.build()
    assert target() is None


def test_the_device_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = buffers()
    evaluate, times = mx.eval, []
    monkeypatch.setattr(mx, "eval", lambda *arrays: times.append(1) or evaluate(*arrays))
    memory.build()
    assert len(times) == 1


def test_a_duplicate_is_compared_with_what_was_staged(staged: LateDriver) -> None:
    made = session(buffers())
    land(made, block(0, 0), values(1))
    assert staged.queued
    land(made, block(0, 0), values(1))
    with pytest.raises(WireError, match="different bytes"):
        land(made, block(0, 0), values(2))


def test_a_block_waits_for_its_layer(driver: LateDriver) -> None:
    memory = buffers(grown=False)
    made = session(memory)
    land(made, block(0, 0), values(0))
    landed = threading.Event()

    def last() -> None:
        land(made, block(LAYERS - 1, 0), values(1))
        landed.set()

    thread = threading.Thread(target=last, daemon=True)
    thread.start()
    assert memory.grow() and made.memory_grew()
    assert not landed.wait(0.2), "the last layer is still missing"
    assert memory.grow() and made.memory_grew()
    assert landed.wait(5)
    thread.join()


def test_a_block_does_not_wait_for_memory_of_an_ended_session() -> None:
    made = session(buffers(grown=False))
    threading.Timer(0.2, made.end, ["cancelled"]).start()
    with pytest.raises(WireError, match="does not receive blocks"):
        made.landing(block(1, 0))
    assert not made.memory_grew()
