"""The memory in which a prompt's front is computed, beside that in which the rest of it comes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_receiver.caches.model import CacheBuffers
from mlx_receiver.receiver import Receiver
from mlx_receiver.sessions import front
from mlx_receiver.wire.messages import Opened
from tests.mlx_receiver.client import FakeVllm, connected, started
from tests.mlx_receiver.conftest import Prefill
from tests.mlx_receiver.sessions.fronts import (
    A_TOKEN,
    FRONT,
    GREEDY,
    HEADS,
    LAYERS,
    Gate,
    finish,
    free,
    opened,
    send,
)
from tests.waiting import eventually


@pytest.fixture
def client(keeping: Receiver) -> Iterator[FakeVllm]:
    free(keeping)
    with connected(keeping, weights="some") as found:
        yield found
    free(keeping)


@pytest.fixture
def gate(keeping: Receiver) -> Iterator[Gate]:
    made = Gate(keeping.engine._gap.fronts)
    yield made
    made.close()


@pytest.mark.parametrize("tokens", [30, 100])
def test_computing_begins_before_there_is_memory(
    client: FakeVllm,
    gate: Gate,
    prefill: Prefill,
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
) -> None:
    """What was computed by then is copied when there is, also if that is all."""
    grow, go_on = CacheBuffers.grow, threading.Event()

    def slowly(self: CacheBuffers) -> bool:
        if self.layers and threading.current_thread().name.startswith("kv-allocate"):
            assert go_on.wait(20)
        return grow(self)

    monkeypatch.setattr(CacheBuffers, "grow", slowly)
    kv = prefill(tokens)
    session = client.open(kv.prompt, GREEDY, FRONT)
    assert isinstance(client.opened(session), Opened)
    gate.let(2)
    found = client.receiver.store.get(session)
    assert found is not None and not found.allocated and not found.computed_bytes
    go_on.set()
    assert eventually(lambda: found.allocated)
    if tokens == 100:
        gate.let(2)
        send(client, session, kv, 64, 100)
    else:
        gate._open.release()
    finish(client, session, kv, min(tokens, 64))


def test_without_memory_all_of_it_comes(tiny_llama_path: Path, prefill: Prefill) -> None:
    kv = prefill(700)
    nbytes = 1300 * A_TOKEN + 700 * 64 + 2 * LAYERS * HEADS * 700
    with started(tiny_llama_path, kv_memory=nbytes) as receiver, connected(receiver) as client:
        session = client.open(kv.prompt, GREEDY, FRONT)
        assert isinstance(client.opened(session), Opened)
        assert eventually(lambda: not receiver.engine._gap.fronts)
        client.send_kv(session, kv)
        finish(client, session, kv, 0)


def test_its_memory_grows_with_it(
    client: FakeVllm, gate: Gate, prefill: Prefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may meet what comes long before the end."""
    monkeypatch.setattr(front, "_ROOM", 256)
    budget, kv = client.receiver.store.budget, prefill(1100)
    session = opened(client, kv)
    found = client.receiver.store.get(session)
    assert found is not None
    seen = []
    for chunks in (1, 16, 16):
        gate.let(chunks)
        seen.append(budget.reserved - found.reservation.nbytes)
    small, _, large = seen
    assert 0 < small < budget.kv_bytes(257) + 257 * 64 < large < budget.kv_bytes(1100)
    send(client, session, kv, 528, 1100)
    finish(client, session, kv, 528)


@pytest.mark.parametrize("where", ["at once", "later"])
def test_texts_that_were_used_longest_ago_make_room_for_it(
    tiny_llama_path: Path, prefill: Prefill, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """As for a session, and no more of them than it needs."""
    if where == "later":
        monkeypatch.setattr(front, "_ROOM", 256)
    kvs, kv = [prefill(240, seed=seed) for seed in range(4)], prefill(700)
    room = (4 * 256 + 768) * A_TOKEN + 200_000  # for what the texts left and a session
    with (
        started(tiny_llama_path, kv_memory=room, prompt_cache=True) as live,
        connected(live, weights="some") as client,
    ):
        gate = Gate(live.engine._gap.fronts)
        for one in kvs:
            client.tokens(client.request(one, GREEDY))
        assert eventually(lambda: len(live.store.residents) == 4)
        session = opened(client, kv)
        assert len(live.store.residents) == 4
        gate.let(3)
        kept = len(live.store.residents)
        assert 0 < kept < 4
        if where == "later":
            gate.let(20)
            assert 0 < len(live.store.residents) < kept
        send(client, session, kv, 16 * gate.computed, 700)
        finish(client, session, kv, 16 * gate.computed)
        kept = len(live.store.residents)
        held = []
        for one in kvs[::-1]:
            session = client.open(one.prompt, GREEDY)
            held.append(client.opened(session).held.tokens)
            client.cancel(session)
        assert held == sorted(held, reverse=True) and held[0] and not held[-1]
        gate.close()


def test_where_memory_ends_the_rest_comes(
    tiny_llama_path: Path, prefill: Prefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front, "_ROOM", 256)
    kv = prefill(1100)
    nbytes = (1280 + 512 + 100) * A_TOKEN + 1100 * 64 + 2 * LAYERS * HEADS * 1100
    with started(tiny_llama_path, kv_memory=nbytes) as receiver, connected(receiver) as client:
        gate = Gate(receiver.engine._gap.fronts)
        session = opened(client, kv)
        gate.let(32)
        assert len(gate.fronts) == 1
        gate._open.release()
        assert eventually(lambda: not gate.fronts)
        found = receiver.store.get(session)
        assert found is not None and receiver.store.budget.reserved == found.reservation.nbytes
        send(client, session, kv, 512, 1100)
        finish(client, session, kv, 512)
        gate.close()
