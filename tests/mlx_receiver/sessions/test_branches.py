"""A prompt that begins like one that is being decoded finds that beginning, and disturbs nobody."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from mlx_receiver.decode.local import LocalJob
from mlx_receiver.receiver import Receiver
from mlx_receiver.wire.messages import Decoded
from mlx_receiver.wire.sampling import Sampling
from tests.mlx_receiver.client import FakeVllm, Prefilled, connected, started
from tests.mlx_receiver.conftest import Prefill
from tests.mlx_receiver.sessions.test_residents import (
    GREEDY,
    WEIGHTS,
    empty,
    held,
    send_rest,
    settled,
)
from tests.waiting import eventually

#: Decodes for longer than any test takes, unless it is cancelled.
ENDLESS = Sampling(max_tokens=7000, temperature=0.0)
SHARED = 300


@pytest.fixture
def client(keeping: Receiver) -> Iterator[FakeVllm]:
    empty(keeping)
    with connected(keeping, weights=WEIGHTS) as found:
        yield found
    empty(keeping)


def branch(prefill: Prefill, number: int, more: int = 5, decode: int = 8) -> Prefilled:
    """A prompt that begins as all of them do."""
    beginning = range(1000, 1000 + SHARED)
    return prefill((*beginning, *range(number, number + more)), decode=decode)


def decoding(
    client: FakeVllm, kv: Prefilled, sampling: Sampling = ENDLESS, start: int = 0
) -> tuple[Prefilled, int, list[int]]:
    """A text of which the receiver has decoded a token; what has come of it is in the list."""
    session = client.open(kv.prompt, sampling)
    assert held(client, session) == start
    send_rest(client, session, kv, start)
    client.start(session, kv.first)
    steps = client.steps(session)
    return kv, session, [kv.first, *next(steps).token_ids]


def finish(client: FakeVllm, session: int, kv: Prefilled, start: int) -> None:
    """Send what is not held; the text must be what all of it gives."""
    assert held(client, session) == start
    send_rest(client, session, kv, start)
    client.start(session, kv.first)
    assert [kv.first, *client.tokens(session)] == kv.tokens


def cancelled(client: FakeVllm, *running: tuple[Prefilled, int, list[int]]) -> None:
    """End these texts; what has come of each is what it would have been without others."""
    for _, session, _ in running:
        client.cancel(session)
    settled(client)
    for kv, session, begun in running:
        entries = [m for m in client.inbox if isinstance(m, Decoded) and m.session == session]
        tokens = begun + [token for entry in entries for token in entry.token_ids]
        assert tokens[: len(kv.tokens)] == kv.tokens[: len(tokens)]
        assert len(tokens) > 5


def test_branches_of_what_is_decoded(client: FakeVllm, prefill: Prefill) -> None:
    donor = branch(prefill, 10, decode=400)
    running = decoding(client, donor)
    store = client.receiver.store
    for number in range(20, 24):
        kv = branch(prefill, number)
        finish(client, client.open(kv.prompt, GREEDY), kv, SHARED)
        assert len(store.residents) >= 1
    cancelled(client, running)
    assert not len(store.earlier.decoded)


@pytest.mark.parametrize("more", [[3], [250, 3], [3, 250, 90]])
def test_rows_of_different_lengths(client: FakeVllm, prefill: Prefill, more: list[int]) -> None:
    """The shorter texts of a batch have padding before them."""
    empty(client.receiver)
    donors = [branch(prefill, 10 + n, tokens, decode=400) for n, tokens in enumerate(more)]
    strangers = [prefill(60 + 200 * n, seed=7 + n, decode=400) for n in range(2)]
    running = [decoding(client, kv) for kv in strangers]
    running += [decoding(client, kv, start=SHARED if n else 0) for n, kv in enumerate(donors)]
    while client.receiver.store.residents.reclaim():
        pass
    for number in range(500, 503):
        kv = branch(prefill, number, 40)
        finish(client, client.open(kv.prompt, GREEDY), kv, SHARED)
    cancelled(client, *running)


def test_several_branches_at_once(client: FakeVllm, prefill: Prefill) -> None:
    donor = branch(prefill, 10, decode=400)
    running = decoding(client, donor)
    kvs = [branch(prefill, number, 30) for number in range(20, 26)]
    sessions = [client.open(kv.prompt, GREEDY) for kv in kvs]
    for kv, other in zip(kvs, sessions, strict=True):
        finish(client, other, kv, SHARED)
    cancelled(client, running)


def test_what_is_kept_is_taken_if_it_is_about_as_long(client: FakeVllm, prefill: Prefill) -> None:
    """Nobody waits for a copy that is worth little."""
    first = branch(prefill, 10)
    finish(client, client.open(first.prompt, GREEDY), first, 0)
    settled(client)
    donor = branch(prefill, 10, 60, decode=400)
    running = decoding(client, donor, start=SHARED + 5)
    kv = branch(prefill, 10, 30)
    finish(client, client.open(kv.prompt, GREEDY), kv, SHARED + 5)
    cancelled(client, running)


def test_other_partitions_find_nothing(client: FakeVllm, prefill: Prefill) -> None:
    donor = branch(prefill, 10, decode=400)
    running = decoding(client, donor)
    kv = branch(prefill, 20)
    finish(client, client.open(kv.prompt, GREEDY, {"salt": "another"}), kv, 0)
    with connected(client.receiver) as unknown:
        finish(unknown, unknown.open(kv.prompt, GREEDY), kv, 0)
    cancelled(client, running)


@pytest.mark.parametrize("room", [1.7, 2.3])
def test_without_room_for_a_copy_all_of_it_is_sent(
    tiny_llama_path: Path, prefill: Prefill, room: float
) -> None:
    donor, kv = branch(prefill, 10, decode=400), branch(prefill, 20)
    one = 4 * 2 * 2 * 32 * 4 * 1024  # with what it may decode
    with (
        started(tiny_llama_path, kv_memory=int(room * one), prompt_cache=True) as receiver,
        connected(receiver, weights=WEIGHTS) as client,
    ):
        limited = msgspec.structs.replace(ENDLESS, max_tokens=600)
        _, session, _ = decoding(client, donor, limited)
        other = client.open(kv.prompt, GREEDY)
        start = held(client, other)
        assert start == (SHARED if room > 2 else 0)
        send_rest(client, other, kv, start)
        client.start(other, kv.first)
        assert [kv.first, *client.tokens(other)] == kv.tokens
        client.cancel(session)
        settled(client)
        empty(receiver)


def test_prompts_of_its_own_find_it_too(keeping: Receiver, prefill: Prefill) -> None:
    empty(keeping)
    donor, kv = branch(prefill, 10, decode=400), branch(prefill, 20)
    running = LocalJob(keeping.engine, donor.prompt, ENDLESS, "mine")
    begun = running.next(60).token_ids
    job = LocalJob(keeping.engine, kv.prompt, GREEDY, "mine")
    assert job.tokens() == kv.tokens
    assert job.held == SHARED
    assert LocalJob(keeping.engine, kv.prompt, GREEDY, "another's").held == 0
    while len(begun) < 60:
        begun = [*begun, *running.next(60).token_ids]
    running.cancel()
    assert begun[:60] == donor.tokens[:60]
    assert eventually(lambda: keeping.store.reserved_bytes == 0)
    empty(keeping)
