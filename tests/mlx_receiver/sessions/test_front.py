"""A prompt's KV comes from the end while the receiver computes its front, until they meet."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from mlx_receiver.caches.model import CacheBuffers
from mlx_receiver.decode.fronts import Fronts
from mlx_receiver.receiver import Receiver
from mlx_receiver.sessions import front
from mlx_receiver.wire.messages import Complete, Opened, Ping, Status
from mlx_receiver.wire.sampling import Sampling
from tests.mlx_receiver.client import FakeVllm, Prefilled, block, connected
from tests.mlx_receiver.conftest import Prefill
from tests.mlx_receiver.sessions.fronts import (
    A_TOKEN,
    FRONT,
    GREEDY,
    HEADS,
    LAYERS,
    Gate,
    arrived,
    finish,
    free,
    opened,
    send,
    send_one,
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


def test_they_meet(client: FakeVllm, gate: Gate, prefill: Prefill) -> None:
    kv = prefill(200)
    session = opened(client, kv)
    send(client, session, kv, 150, 200)
    arrived(client, session, 50 * A_TOKEN)
    gate.let(4)
    send(client, session, kv, 64, 150)
    finish(client, session, kv, 64)


def test_both_are_progress(client: FakeVllm, gate: Gate, prefill: Prefill) -> None:
    kv = prefill(100)
    session = opened(client, kv)
    seen = []
    for start, end in ((80, 100), (60, 80)):
        gate.let(1)
        send(client, session, kv, start, end)
        arrived(client, session, (100 - start) * A_TOKEN)
        ping = time.monotonic_ns()
        client.send(Ping(ping))
        status = client.wait(lambda m, ping=ping: isinstance(m, Status) and m.ping_ns == ping)
        (progress,) = (p for p in status.sessions if p.session == session)
        seen.append(progress.kv_bytes)
    assert seen == [36 * A_TOKEN, 72 * A_TOKEN]
    client.cancel(session)


def test_everything_is_computed(client: FakeVllm, gate: Gate, prefill: Prefill) -> None:
    kv = prefill(100)
    session = opened(client, kv)
    gate.let(7)  # the last one of four tokens
    finish(client, session, kv, 100)


def test_everything_arrives(client: FakeVllm, gate: Gate, prefill: Prefill) -> None:
    kv = prefill(100)
    session = opened(client, kv)
    send(client, session, kv, 50, 100)
    send(client, session, kv, 0, 50)
    finish(client, session, kv, 0)
    assert not gate.computed


def test_what_arrives_decides_where_computing_goes_on(
    client: FakeVllm, gate: Gate, prefill: Prefill
) -> None:
    """vLLM prefills in steps: the end of each is there before that of the next."""
    kv = prefill(200)
    session = opened(client, kv)
    gate.let(1)
    send(client, session, kv, 16, 80)
    arrived(client, session, 64 * A_TOKEN)
    gate.let(1)  # 80 to 96
    send(client, session, kv, 104, 150)
    arrived(client, session, 110 * A_TOKEN)
    gate.let(3)  # 96 to 104, 150 to 182
    send(client, session, kv, 182, 200)
    finish(client, session, kv, 16 + 16 + 8 + 32)


def test_a_piece_that_has_come_in_part(client: FakeVllm, gate: Gate, prefill: Prefill) -> None:
    """Rows that are there stay vLLM's; the others of the same tokens are computed."""
    kv = prefill(64)
    session = opened(client, kv)
    send(client, session, kv, 32, 64)
    for layer in (0, 1, 3):
        send_one(client, session, kv, layer, 1, 20, 32)
    arrived(client, session, 32 * A_TOKEN + 3 * 12 * A_TOKEN // 8)
    gate.let(2)
    complete = client.complete(session)
    assert complete.kv_bytes == 32 * A_TOKEN + 3 * 12 * A_TOKEN // 8
    assert complete.kv_bytes + complete.computed_bytes == 64 * A_TOKEN
    client.start(session, kv.first)
    assert [kv.first, *client.tokens(session)] == kv.tokens


@pytest.mark.parametrize("room", [None, 16])
def test_what_is_still_arriving_is_not_read(
    client: FakeVllm, gate: Gate, prefill: Prefill, monkeypatch: pytest.MonkeyPatch,
    room: int | None,
) -> None:  # fmt: skip
    """A block arrives slowly where tokens are computed, and computing goes on behind it."""
    kv = prefill(120)
    if room is not None:
        monkeypatch.setattr(front, "_ROOM", room)
    session = opened(client, kv)
    found = client.receiver.store.get(session)
    assert found is not None
    if room is None:
        send(client, session, kv, 32, 64)
        arrived(client, session, 32 * A_TOKEN)
    header, payload = block(session, kv, 0, 0, slice(0, HEADS), slice(16, 32))
    landing = found.landing(header)
    gate.let(2)
    computed = found.computed_bytes
    time.sleep(0.1)  # the gate is closed, but what is not computed may still be prepared
    gate._open.release()
    time.sleep(0.2)
    assert found.computed_bytes == computed, "the next chunk waits"
    data, at = memoryview(payload).cast("B"), 0
    for buffer in landing.buffers:
        buffer[:] = data[at : at + buffer.nbytes]
        at += buffer.nbytes
    landing.commit()
    assert eventually(lambda: gate.computed == 3)
    if room is not None:
        gate.let(1)  # 48 to 64
    send(client, session, kv, 64, 120)
    complete = client.complete(session)
    assert complete.kv_bytes + complete.computed_bytes == 120 * A_TOKEN
    client.start(session, kv.first)
    assert [kv.first, *client.tokens(session)] == kv.tokens


@pytest.mark.parametrize("ends", [False, True])
def test_what_has_come_is_read_a_layer_at_a_time(
    client: FakeVllm, gate: Gate, prefill: Prefill, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    """Running responses get a token in between."""
    kv = prefill(120)
    session = opened(client, kv)
    found, read = client.receiver.store.get(session), []
    assert found is not None
    for_all, compute = found.read, gate.compute

    def slowly(tokens: int, layer: int, into: CacheBuffers) -> bool:
        read.append(f"layer {layer}")
        return for_all(tokens, layer, into)

    def between(loaded: Any, rows: int, seconds: float) -> bool:
        computed = compute(loaded, rows, seconds)
        read.append("step")
        if ends and "layer 1" in read:
            client.receiver.store.end(found, "cancelled")
        return computed

    gate.seconds = 0.0
    monkeypatch.setattr(found, "read", slowly)
    gate.fronts.compute = between  # type: ignore[method-assign]
    gate.let(1)
    send(client, session, kv, 16, 80)
    arrived(client, session, 64 * A_TOKEN)
    if ends:
        gate._open.release()
        assert eventually(lambda: found.phase == "ended")
        return
    gate.let(1)
    layers = [what for what in read[read.index("layer 0") :] if what]
    assert [what for what in layers if what != "step"] == [f"layer {i}" for i in range(LAYERS)]
    assert all("step" in layers[layers.index(f"layer {i}") + 1] for i in range(LAYERS))
    send(client, session, kv, 96, 120)
    finish(client, session, kv, 32)


def test_what_was_computed_may_come_too(client: FakeVllm, gate: Gate, prefill: Prefill) -> None:
    """Before the two meet, when they have, and while it is decoded; in other low bits."""
    kv, text = prefill(120), prefill(120, decode=100)
    rounded = Prefilled(kv.prompt, [[p ^ 1 for p in of] for of in kv.planes], "float32", kv.tokens)
    session = opened(client, kv, Sampling(max_tokens=100, temperature=0.0))
    gate.let(4)
    send(client, session, rounded, 0, 64)
    send(client, session, kv, 60, 100)
    send(client, session, kv, 100, 120)
    complete = client.complete(session)
    assert complete == Complete(session, 56 * A_TOKEN, 64 * A_TOKEN)
    send(client, session, rounded, 30, 90)
    client.start(session, kv.first)
    steps = client.steps(session)
    first = next(steps)
    send(client, session, rounded, 0, 120)
    tokens = [token for step in steps for token in step.token_ids]
    assert [kv.first, *first.token_ids, *tokens] == text.tokens


def test_what_came_twice_must_be_equal(client: FakeVllm, gate: Gate, prefill: Prefill) -> None:
    kv = prefill(100)
    other = Prefilled(kv.prompt, [[p ^ 1 for p in of] for of in kv.planes], "float32", kv.tokens)
    session = opened(client, kv)
    gate.let(2)
    send(client, session, kv, 60, 100)
    send_one(client, session, other, 1, 0, 70, 80)
    assert "twice with different bytes" in client.failed(session).reason


@pytest.mark.parametrize("computed", [0, 2])
@pytest.mark.parametrize("sent", [False, True])
def test_it_is_cancelled(
    client: FakeVllm, gate: Gate, prefill: Prefill, computed: int, sent: bool
) -> None:
    kv = prefill(100)
    session = opened(client, kv)
    gate.let(computed)
    if sent:
        send(client, session, kv, 50, 100)
        arrived(client, session, 50 * A_TOKEN)
    client.cancel(session)
    free(client.receiver)
    assert gate.computed == computed


def test_it_is_cancelled_when_it_is_complete(
    client: FakeVllm, gate: Gate, prefill: Prefill
) -> None:
    kv = prefill(40)
    session = opened(client, kv)
    gate.let(3)
    client.complete(session)
    client.cancel(session)
    free(client.receiver)


@pytest.mark.parametrize("more", [30, 600])
def test_a_beginning_that_is_held(
    client: FakeVllm, gate: Gate, prefill: Prefill, more: int
) -> None:
    """Continued in its own memory, and in a copy."""
    kv = prefill(300)
    session = client.open(kv.prompt, GREEDY)
    client.opened(session)
    client.send_kv(session, kv)
    client.start(session, kv.first)
    assert [kv.first, *client.tokens(session)] == kv.tokens
    assert eventually(lambda: len(client.receiver.store.residents) == 1)
    kv = prefill((*kv.prompt, *kv.tokens, *range(100, 100 + more)))
    session = client.open(kv.prompt, GREEDY, FRONT)
    assert client.opened(session).held.tokens == 308
    found = client.receiver.store.get(session)
    assert found is not None and found.beginning.alone is (more == 30)
    assert eventually(lambda: len(client.receiver.engine._gap.fronts) > 0 and found.allocated)
    gate.let(1)
    send(client, session, kv, 324, 308 + more)
    finish(client, session, kv, 16, held=308)


def test_other_texts_are_decoded_between_the_chunks(
    client: FakeVllm, gate: Gate, prefill: Prefill
) -> None:
    other, kv = prefill(30, decode=300), prefill(400)
    text = client.request(other, Sampling(max_tokens=300, temperature=0.0))
    steps = client.steps(text)
    tokens = [other.first, *next(steps).token_ids]
    session = opened(client, kv)
    gate.let(3)
    for _ in range(5):
        tokens += next(steps).token_ids
    assert client.receiver.engine.decoding == 1
    gate.let(3)
    send(client, session, kv, 96, 400)
    finish(client, session, kv, 96)
    assert [*tokens, *(token for step in steps for token in step.token_ids)] == other.tokens


def test_several_prompts_take_turns(client: FakeVllm, gate: Gate, prefill: Prefill) -> None:
    kvs = [prefill(100, seed=seed) for seed in range(3)]
    sessions = [opened(client, kv) for kv in kvs]
    assert eventually(lambda: len(gate.fronts) == 3)
    send(client, sessions[0], kvs[0], 0, 100)
    finish(client, sessions[0], kvs[0], 0)
    gate.let(3)
    for session, kv, computed in zip(sessions[1:], kvs[1:], (32, 16), strict=True):
        send(client, session, kv, computed, 100)
        finish(client, session, kv, computed)


def test_computing_that_fails_harms_nothing(
    client: FakeVllm, gate: Gate, prefill: Prefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv = prefill(100)
    session = opened(client, kv)
    gate.let(2)
    found = client.receiver.store.get(session)

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(found, "put", fail)
    gate.let(1)
    assert eventually(lambda: not gate.fronts)
    send(client, session, kv, 32, 100)
    finish(client, session, kv, 32)


def test_with_many_texts_under_way_nothing_is_computed(prefill: Prefill) -> None:
    class Never:
        wanted = True

    fronts = Fronts()
    fronts.add(Never())  # type: ignore[arg-type]
    assert not fronts.compute(None, 5)  # type: ignore[arg-type]
    assert len(fronts) == 1


def test_a_proof_is_of_what_comes(client: FakeVllm, gate: Gate, prefill: Prefill) -> None:
    kv = prefill(40)
    session = client.open(kv.prompt, GREEDY, {**FRONT, "proof": True})
    client.opened(session)
    client.send_kv(session, kv)
    complete = client.complete(session)
    assert complete.computed_bytes == 0
    client.cancel(session)


@contextmanager
def paced(client: FakeVllm, seconds: float) -> Iterator[None]:
    """Each block takes that long."""
    assert client.data is not None
    send = client.data.send

    def slowly(*frame: Any) -> None:
        time.sleep(seconds)
        send(*frame)

    client.data.send = slowly  # type: ignore[method-assign]
    try:
        yield
    finally:
        del client.data.send  # type: ignore[method-assign]


@pytest.mark.parametrize("seed", range(6))
def test_in_any_order(client: FakeVllm, prefill: Prefill, seed: int) -> None:
    """Both as fast as they can, and pieces from the end, in random order or twice."""
    rng = random.Random(seed)
    kv = prefill(rng.choice([1, 16, 300, 1100]), seed=seed)
    tokens = len(kv.prompt)
    session = client.open(kv.prompt, GREEDY, FRONT)
    assert isinstance(client.opened(session), Opened)
    step = rng.choice([7, 64, 200])
    pieces = [(max(0, end - step), end) for end in range(tokens, 0, -step)]
    if seed % 3 == 1:
        rng.shuffle(pieces)
    if seed % 3 == 2:
        pieces = [piece for piece in pieces for _ in range(2)]
    with paced(client, rng.choice([0.0, 0.0005, 0.003])):
        for start, end in pieces:
            send(client, session, kv, start, end)
    complete = client.complete(session)
    assert complete.kv_bytes + complete.computed_bytes == tokens * A_TOKEN
    client.start(session, kv.first)
    assert [kv.first, *client.tokens(session)] == kv.tokens
