"""One worker's KV for several receivers: each gets its own sessions' blocks, at its own pace."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tests.vllm_mac_decode.ranks import Request, Store, Worker, workers
from tests.waiting import eventually
from vllm_mac_decode.worker import staging
from vllm_mac_decode.worker.staging import SLOT_BYTES, NoStaging, StagingRing


@pytest.fixture
def pair() -> Iterator[tuple[Store, Store]]:
    """Two receivers; workers know the second one as number 1."""
    first, second = Store(), Store()
    second.target = replace(second.target, number=1)
    yield first, second
    first.stop()
    second.stop()


def test_each_gets_the_blocks_of_its_own_sessions(pair: tuple[Store, Store]) -> None:
    first, second = pair
    requests = [Request(40, [9, 3, 4]), Request(64, [1, 2, 6, 5]), Request(16, [7])]
    owners = [first, second, first]
    with workers({}) as (worker,):
        sessions = [store.add(request) for request, store in zip(requests, owners, strict=True)]
        for start, end in ((0, 16), (16, 40), (40, 64)):
            work = [
                (request, start, min(end, request.tokens), store)
                for request, store in zip(requests, owners, strict=True)
                if start < request.tokens
            ]
            worker.step([item[:3] for item in work], *(store.target for *_, store in work))
        worker.wait_finished(*requests)
        worker.overwrite()
        assert eventually(lambda: len(first.completed) == 2 and len(second.completed) == 1)
        for request, session in zip(requests, sessions, strict=True):
            request.check(session)
        assert not first.failures and not second.failures
        assert len(worker.exporter.threads) == 2 * 3


def test_one_that_does_not_read_holds_nothing_of_the_others_up(pair: tuple[Store, Store]) -> None:
    """64 MiB for it against 16 MiB of staging; meanwhile the other's sessions come and go."""
    stuck, other = Store(layers=8, dim=64), Store(layers=8, dim=64)
    other.target = replace(other.target, number=1)
    options = {"layers": range(8), "blocks": 300, "dim": 64, "staging_mib": 16, "stall_timeout": 30}
    with workers(options) as (worker,):
        large = Request(4096, list(range(256)), layers=8, dim=64)
        session = stuck.add(large)
        assert eventually(lambda: session.allocated_layers == 8)
        stuck.reading.clear()
        worker.step([(large, 0, 4096)], stuck.target)
        for number in range(3):
            small = Request(16, [280 + number], layers=8, dim=64)
            got = other.add(small)
            began = time.monotonic()
            worker.step([(small, 0, 16)], other.target)
            worker.wait_finished(small, seconds=2)
            assert eventually(lambda small=small: small.session in other.completed, 5)
            assert time.monotonic() - began < 2
            small.check(got)
        assert worker.ledger.finished({large.id}) == set(), "its blocks are still being read"
        stuck.reading.set()
        worker.wait_finished(large)
        assert eventually(lambda: large.session in stuck.completed)
    stuck.stop()
    other.stop()


def test_one_that_is_gone_costs_its_own_sessions_only(pair: tuple[Store, Store]) -> None:
    first, gone = pair
    gone.listener.close()
    lost, good = Request(16, [1]), Request(16, [2])
    with workers({}) as (worker,):
        session = first.add(good)
        worker.step([(lost, 0, 16), (good, 0, 16)], gone.target, first.target)
        worker.wait_finished(lost, good)
        assert eventually(lambda: good.session in first.completed)
        good.check(session)
        found: list[int] = []
        assert eventually(
            lambda: bool(found.extend(worker.exporter.take_unreachable()) or found), 10
        )
        assert found == [lost.session]
        assert not worker.exporter.stopped


def test_a_session_without_a_receiver_disturbs_nobody(pair: tuple[Store, Store]) -> None:
    """Its own was lost between the scheduler's step and the worker's."""
    first, _ = pair
    good, lost = Request(16, [2]), Request(16, [1])
    with workers({}) as (worker,):
        session = first.add(good)
        spans = [good.span(0, 16), lost.span(0, 16)]
        worker.exporter.begin_step(spans, [], {good.session: first.target})
        for layer in worker.caches:
            worker.write(layer, good, 0, 16)
        worker.exporter.end_step()
        worker.wait_finished(good, lost)
        assert eventually(lambda: good.session in first.completed)
        good.check(session)
        assert worker.exporter.take_unreachable() == []


def test_a_session_that_ends_in_its_first_step_frees_its_blocks(pair: tuple[Store, Store]) -> None:
    """At a receiver that nothing was sent to yet, and that does not answer."""
    _, silent = pair
    ended = Request(16, [1])
    with workers({}) as (worker,):
        span = ended.span(0, 16)
        worker.exporter.begin_step([span], [ended.session], {ended.session: silent.target})
        worker.exporter.end_step()
        worker.wait_finished(ended)


def test_a_fault_at_one_stops_all_before_vllm_reuses_a_block(pair: tuple[Store, Store]) -> None:
    first, second = pair
    good, bad = Request(32, [1, 2]), Request(16, [9999])  # no such block
    with workers({}) as (worker,):
        first.add(good)
        second.add(bad)
        first.reading.clear()
        span = bad.span(0, 16)
        worker.exporter.begin_step(
            [good.span(0, 16), span],
            [],
            {good.session: first.target, bad.session: second.target},
        )
        worker.exporter.end_step()
        assert eventually(lambda: worker.exporter.stopped)
        assert worker.ledger.finished({good.id, bad.id}) == {good.id, bad.id}
        first.reading.set()
        worker.step([(good, 16, 32)], first.target)
        assert not eventually(lambda: bool(first.completed), 1), "nothing more is sent"


def test_staging_of_the_second_is_taken_when_it_is_needed() -> None:
    ring = StagingRing(4 * SLOT_BYTES, torch.device("cpu"), at_once=False)
    assert ring._made == 0
    slots = [ring.acquire(SLOT_BYTES) for _ in range(4)]
    assert ring._made == 4 and len({id(slot) for slot in slots}) == 4
    threading.Timer(0.1, ring.release, [slots[2]]).start()
    assert ring.acquire(1) is slots[2], "the bound holds"


def test_without_memory_there_is_less_staging_and_never_a_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ring = StagingRing(4 * SLOT_BYTES, torch.device("cpu"), at_once=False)
    first = ring.acquire(1)

    def no_memory(self: StagingRing, nbytes: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(StagingRing, "_make", no_memory)
    threading.Timer(0.1, ring.release, [first]).start()
    assert ring.acquire(1) is first, "what there is serves"
    with pytest.raises(NoStaging, match="out of memory"):
        ring.acquire(SLOT_BYTES + 1)
    with pytest.raises(NoStaging, match="out of memory"):
        StagingRing(SLOT_BYTES, torch.device("cpu"), at_once=False).acquire(1)


def test_a_session_that_cannot_be_staged_is_given_up(
    pair: tuple[Store, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, second = pair
    lost = Request(16, [1])
    second.add(lost)
    with workers({}) as (worker,):

        def no_memory(self: StagingRing, nbytes: int) -> None:
            raise staging.NoStaging("no memory")

        monkeypatch.setattr(StagingRing, "acquire", no_memory)
        worker.step([(lost, 0, 16)], second.target)
        worker.wait_finished(lost)
        assert eventually(lambda: worker.exporter.take_unreachable() == [lost.session])
        assert not worker.exporter.stopped


def test_two_workers_share_two_receivers(pair: tuple[Store, Store]) -> None:
    """Tensor parallelism: each has half the heads of both sessions."""
    requests = [Request(40, [9, 3, 4]), Request(40, [1, 2, 5])]
    with workers({"heads": range(2)}, {"heads": range(2, 4)}) as ranks:
        sessions = [store.add(r) for r, store in zip(requests, pair, strict=True)]
        for rank in ranks:
            rank.step([(r, 0, 40) for r in requests], *(store.target for store in pair))
        for rank in ranks:
            assert isinstance(rank, Worker)
            rank.wait_finished(*requests)
        for store, request, session in zip(pair, requests, sessions, strict=True):
            assert eventually(lambda s=store, r=request: r.session in s.completed)
            request.check(session)
