"""What leaves from its end: in which order, as soon as it is computed, until it is not wanted."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest

from mlx_receiver.transports.transport import Landing
from mlx_receiver.wire.frames import Header
from tests.vllm_mac_decode.ranks import DIM, LAYERS, Request, Store, Worker, hand_over, workers
from tests.waiting import eventually
from vllm_mac_decode.worker.from_end import PIECE_TOKENS, FromEnd

P = PIECE_TOKENS


class Noting(Store):
    """Notes which blocks land."""

    def __init__(self, dim: int = DIM) -> None:
        super().__init__(dim=dim)
        self.landed: list[tuple[int, int, int]] = []

    def landing(self, client: str, header: Header) -> Landing:
        self.landed.append((header.session, header.token_start, header.layer))
        return super().landing(client, header)


@pytest.fixture
def store() -> Iterator[Noting]:
    made = Noting()
    yield made
    made.stop()


def taken(from_end: FromEnd[str]) -> list[tuple[str, int, int, bool]]:
    found = []
    while from_end:
        found.append(tuple(from_end.take()))
    return found  # type: ignore[return-value]


def test_all_layers_of_a_piece_come_before_the_piece_in_front() -> None:
    from_end = FromEnd[str]()
    for layer in "abc":
        from_end.add(1, layer, 10, 2 * P + 3)
    assert taken(from_end) == [
        ("a", 2 * P, 2 * P + 3, False), ("b", 2 * P, 2 * P + 3, False),
        ("c", 2 * P, 2 * P + 3, False),
        ("a", P, 2 * P, False), ("b", P, 2 * P, False), ("c", P, 2 * P, False),
        ("a", 10, P, True), ("b", 10, P, True), ("c", 10, P, True),
    ]  # fmt: skip


def test_what_is_computed_later_comes_first() -> None:
    from_end = FromEnd[str]()
    from_end.add(1, "a", 0, 4 * P)
    assert from_end.take() == ("a", 3 * P, 4 * P, False)
    from_end.add(1, "b", 0, 4 * P)
    assert from_end.take() == ("b", 3 * P, 4 * P, False)
    from_end.add(1, "later", 4 * P, 4 * P + 1)
    assert from_end.take() == ("later", 4 * P, 4 * P + 1, True)
    assert [name for name, *_ in taken(from_end)] == ["a", "b"] * 3


def test_sessions_take_turns_in_the_order_in_which_they_came() -> None:
    from_end = FromEnd[str]()
    from_end.add(1, "a", 0, P + 1)
    from_end.add(2, "b", 0, 5 * P)
    from_end.add(1, "c", 0, P)
    assert [name for name, *_ in taken(from_end)] == ["a", "a", "c", *"bbbbb"]


def test_what_is_dropped_is_taken_no_more() -> None:
    from_end = FromEnd[str]()
    for session, name in itertools.product((1, 2), "ab"):
        from_end.add(session, f"{name}{session}", 0, 2 * P)
    from_end.take()
    assert sorted(from_end.drop(1)) == ["a1", "b1"] and not from_end.drop(1)
    assert [name for name, *_ in taken(from_end)] == ["a2", "b2"] * 2
    assert not from_end


@pytest.mark.parametrize("seed", range(5))
def test_every_token_of_every_job_is_taken_once(seed: int) -> None:
    rng = random.Random(seed)
    from_end, wanted, found, ended = FromEnd[int](), set(), [], set()
    for job in range(30):
        low = rng.randrange(1000)
        high = low + rng.randrange(1, 700)
        from_end.add(rng.randrange(3), job, low, high)
        wanted |= {(job, token) for token in range(low, high)}
        for _ in range(rng.randrange(4) if from_end else 0):
            if from_end:
                piece = from_end.take()
                found += [(piece.job, token) for token in range(piece.low, piece.high)]
                ended |= {piece.job} if piece.last else set()
    for job, low, high, last in taken(from_end):
        found += [(job, token) for token in range(low, high)]
        assert job not in ended
        ended |= {job} if last else set()
    assert len(found) == len(set(found)) and set(found) == wanted and len(ended) == 30


@pytest.mark.parametrize("cuts", [[], [128, 256], [100, 130, 391], [17]])
@pytest.mark.parametrize("streams", [1, 2])
def test_the_bytes_are_right(store: Noting, cuts: list[int], streams: int) -> None:
    request = Request(400, random.Random(1).sample(range(40), 25), from_end=True)
    other = Request(40, [39, 38, 37])
    request.blocks = [b for b in range(40) if b not in other.blocks][:25]
    steps = [[(request, a, b)] for a, b in itertools.pairwise([0, *cuts, 400])]
    steps[-1].append((other, 0, 40))
    with workers({"streams": streams}) as ranks:
        hand_over(store, ranks, steps)


def test_the_last_tokens_leave_first(store: Noting) -> None:
    request = Request(3 * P, list(range(24)), from_end=True)
    with workers({"blocks": 24}) as (worker,):
        # Accepted only once everything is computed.
        worker.step([(request, 0, 200)], store.target)
        worker.step([(request, 200, 3 * P)], store.target)
        assert worker.ledger.finished({request.id}) == set()
        session = store.add(request)
        worker.wait_finished()
        assert eventually(lambda: session.complete)
        assert eventually(lambda: worker.ledger.finished(set()) == {request.id})
    starts = [start for _, start, _ in store.landed]
    # The second step's piece of the middle begins where that step does.
    assert starts == sorted(starts, reverse=True) and set(starts) == {2 * P, 200, P, 0}
    for start in set(starts):
        layers = [layer for _, at, layer in store.landed if at == start]
        assert layers == sorted(layers) and set(layers) == set(range(LAYERS))


def test_what_is_held_does_not_leave(store: Noting) -> None:
    before = Request(200, list(range(13)))
    request = Request(400, list(range(13, 38)), from_end=True)
    with workers({}) as (worker,):
        hand_over(store, [worker], [[(before, 0, 200)]])
        store.landed.clear()
        session = store.add(request)
        session.begin_with(type(session.held)(150))
        worker.step([(request, 0, 140)], store.target)
        worker.step([(request, 140, 400)], store.target)
        worker.wait_finished(request)
        assert eventually(lambda: session.complete)
    assert min(start for _, start, _ in store.landed) == 150


@pytest.fixture
def large() -> Iterator[tuple[Noting, Request, Worker]]:
    """32 MiB through two staging buffers, to a receiver that does not read yet."""
    store = Noting(dim=64)
    request = Request(4096, list(range(256)), dim=64, from_end=True)
    with workers({"blocks": 300, "dim": 64, "staging_mib": 16, "stall_timeout": 30}) as (worker,):
        session = store.add(request)
        assert eventually(lambda: session.allocated_layers == LAYERS)
        worker.step([(Request(16, [299], dim=64), 0, 16)], store.target)  # connects
        store.reading.clear()
        yield store, request, worker
    store.stop()


def test_what_is_not_wanted_any_more_is_freed(large: tuple[Noting, Request, Worker]) -> None:
    """The receiver has computed the rest."""
    store, request, worker = large
    session = store.get(request.session)
    assert session is not None
    worker.step([(request, 0, 4096)], store.target)
    assert not eventually(lambda: bool(worker.ledger.finished({request.id})), 0.5)
    worker.exporter.begin_step([], [request.session], {})
    store.reading.set()
    found: set[str] = set()

    def freed() -> bool:
        found.update(worker.ledger.finished(set()))
        return request.id in found

    assert eventually(freed, 5.0)
    # Later steps of it are nothing to anybody.
    worker.step([(request, 4000, 4096)], store.target)
    worker.wait_finished(request, seconds=5.0)
    hand_over(store, [worker], [[(Request(16, [5], dim=64), 0, 16)]])
    assert not session.complete and not store.failures


def test_other_sessions_do_not_wait_for_it(large: tuple[Noting, Request, Worker]) -> None:
    """They go before what has not been read."""
    store, request, worker = large
    worker.step([(request, 0, 4096)], store.target)
    small = Request(16, [290], dim=64)
    got = store.add(small)
    worker.step([(small, 0, 16)], store.target)
    store.reading.set()
    assert eventually(lambda: small.session in store.completed, 10)
    small.check(got)
    session = store.get(request.session)
    assert session is not None and eventually(lambda: session.complete, 20)
    numbers = [session for session, *_ in store.landed]
    assert len(numbers) - numbers.index(small.session) > 100
    request.check(session)


def test_a_receiver_that_dies_holds_nothing(large: tuple[Noting, Request, Worker]) -> None:
    dying, request, worker = large
    worker.step([(request, 0, 4096)], dying.target)
    assert not eventually(lambda: bool(worker.ledger.finished({request.id})), 0.5)
    dying.stop()
    assert eventually(lambda: worker.ledger.finished(set()) == {request.id}, 5)
    alive = Store(dim=64)
    try:
        hand_over(alive, [worker], [[(Request(16, [5], dim=64), 0, 16)]])
    finally:
        alive.stop()
