"""From a paged cache to a receiver's memory: every byte, in time, or given up cleanly."""

from __future__ import annotations

import itertools
import random
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlx_receiver.sessions import store as store_module
from mlx_receiver.sessions.store import SessionStore
from mlx_receiver.transports.transport import Landing
from mlx_receiver.wire.frames import Header, Kind
from mlx_receiver.wire.keys import new_ticket
from mlx_receiver.wire.messages import Endpoint
from tests.vllm_mac_decode.ranks import LAYERS, Request, Store, Worker, hand_over, workers
from tests.waiting import eventually
from vllm_mac_decode.export import DataTarget


@pytest.fixture
def store() -> Iterator[Store]:
    made = Store()
    yield made
    made.stop()


@pytest.fixture
def worker() -> Iterator[Worker]:
    with workers({}) as (made,):
        yield made


def test_a_prompt_in_one_step(store: Store, worker: Worker) -> None:
    request = Request(40, [9, 3, 4])
    hand_over(store, [worker], [[(request, 0, 40)]])


@pytest.mark.parametrize("cuts", [[16, 32], [1, 2, 17], [10, 11, 40], [31, 33], [7, 20, 21, 47]])
def test_spans_that_start_and_end_inside_blocks(
    store: Store, worker: Worker, cuts: list[int]
) -> None:
    request = Request(50, [12, 11, 30, 31])
    steps = [[(request, a, b)] for a, b in itertools.pairwise([0, *cuts, 50])]
    hand_over(store, [worker], steps)


@pytest.mark.parametrize("streams", [1, 3])
def test_several_requests_in_one_step(store: Store, streams: int) -> None:
    a, b, c = Request(33, [0, 5, 2]), Request(5, [7]), Request(64, [20, 21, 22, 39])
    steps = [[(a, 0, 20), (b, 0, 5)], [(a, 20, 33), (c, 0, 50)], [(c, 50, 64)]]
    with workers({"streams": streams}) as ranks:
        hand_over(store, ranks, steps)


def test_blocks_are_spread_over_all_connections() -> None:
    # One connection lands nothing: what it carries is missing, the other goes on.
    store = Store(layers=8, dim=64)
    request = Request(1024, list(range(64)), layers=8, dim=64)
    options = {"layers": range(8), "blocks": 64, "dim": 64, "streams": 2, "stall_timeout": 5.0}
    held = threading.Lock()
    threads: set[threading.Thread] = set()

    def landing(client: str, header: Header) -> Landing:
        threads.add(threading.current_thread())
        if held.acquire(blocking=False):
            store.reading.wait(20)
        return SessionStore.landing(store, client, header)

    store.landing = landing  # type: ignore[method-assign]
    store.reading.clear()
    try:
        with workers(options) as (worker,):
            session = store.add(request)
            worker.step([(request, 0, 1024)], store.target)
            blocks = session.timeline.blocks
            assert eventually(lambda: len(blocks) >= 4, 10), "one connection holds up the other"
            assert len(threads) == 2 and not session.complete
            store.reading.set()
            assert eventually(lambda: session.complete)
            request.check(session)
    finally:
        store.stop()


@pytest.mark.parametrize("hooks", [0, 2])
def test_hooks_that_never_or_twice_run(store: Store, worker: Worker, hooks: int) -> None:
    # A replayed CUDA graph calls none; some layers are announced before and after attention.
    request = Request(40, [9, 3, 4])
    session = store.add(request)
    worker.step([(request, 0, 40)], store.target, hooks=hooks)
    assert eventually(lambda: session.complete)
    worker.wait_finished(request)
    assert session.timeline.blocks_received == 2 * LAYERS
    request.check(session)


RANKS: dict[str, list[dict[str, Any]]] = {
    "tp": [{"heads": range(0, 2)}, {"heads": range(2, 4)}],
    "pp": [{"layers": range(0, 2)}, {"layers": range(2, 4)}],
    "tp and pp": [
        {"heads": range(h, h + 2), "layers": range(first, first + 2)}
        for h, first in itertools.product((0, 2), (0, 2))
    ],
}


@pytest.mark.parametrize("options", RANKS.values(), ids=RANKS)
def test_several_workers_fill_one_session(store: Store, options: list[dict[str, Any]]) -> None:
    a, b = Request(50, [12, 11, 30, 31]), Request(18, [1, 0])
    with workers(*options) as ranks:
        hand_over(store, ranks, [[(a, 0, 23)], [(a, 23, 50), (b, 0, 18)]])


def test_kernel_blocks_that_are_a_fraction_of_the_schedulers(store: Store) -> None:
    request = Request(150, [4, 0, 3])
    with workers({"blocks": 5, "block_size": 64, "kernel_block": 16}) as ranks:
        hand_over(store, ranks, [[(request, 0, 70)], [(request, 70, 150)]])


def test_spans_larger_than_a_staging_buffer() -> None:
    # 2 KiB a token and layer: three pieces of at most 8 MiB.
    store = Store(layers=2, dim=64)
    request = Request(9000, random.Random(1).sample(range(600), 563), layers=2, dim=64)
    options = {"layers": range(2), "blocks": 600, "dim": 64, "staging_mib": 16, "checksum": True}
    try:
        with workers(options) as ranks:
            hand_over(store, ranks, [[(request, 0, 9000)]])
    finally:
        store.stop()


def test_blocks_may_be_reused_as_soon_as_they_are_reported(store: Store, worker: Worker) -> None:
    # The receiver is slow, so that most of the bytes are still in staging when vLLM goes on.
    store.pace = 0.03
    first, second = Request(64, [1, 2, 3, 4]), Request(64, [4, 3, 2, 1])
    sessions = [store.add(first), store.add(second)]
    worker.step([(first, 0, 64)], store.target)
    worker.wait_finished(first)
    worker.overwrite()
    assert not sessions[0].complete
    worker.step([(second, 0, 64)], store.target)
    worker.wait_finished(second)
    worker.overwrite()
    assert eventually(lambda: sessions[0].complete and sessions[1].complete)
    first.check(sessions[0])
    second.check(sessions[1])


def test_blocks_wait_until_the_session_is_accepted(store: Store, worker: Worker) -> None:
    request = Request(40, [9, 3, 4])
    worker.step([(request, 0, 40)], store.target)
    time.sleep(0.1)
    assert worker.ledger.finished({request.id}) == set(), "the receiver has not heard of it"
    session = store.add(request)
    worker.wait_finished()
    assert eventually(lambda: session.complete)
    assert eventually(lambda: worker.ledger.finished(set()) == {request.id})
    request.check(session)


def test_a_session_that_ends_unaccepted_releases_its_blocks(store: Store, worker: Worker) -> None:
    given_up, other = Request(40, [9, 3, 4]), Request(16, [5])
    worker.step([(given_up, 0, 40)], store.target)
    assert worker.ledger.finished({given_up.id}) == set()
    worker.exporter.begin_step([], [given_up.session], {})
    assert eventually(lambda: worker.ledger.finished(set()) == {given_up.id})
    hand_over(store, [worker], [[(other, 0, 16)]])


def test_a_refused_session_releases_its_blocks(
    store: Store, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "ATTACH_SECONDS", 0.1)
    refused, other = Request(40, [9, 3, 4]), Request(16, [5])
    worker.step([(refused, 0, 40)], store.target)
    time.sleep(0.3)
    store.sweep()  # nobody opened the session in time
    worker.wait_finished(refused, seconds=10)
    # Later chunks of it are given up at once.
    worker.step([(refused, 0, 40)], store.target)
    worker.wait_finished(refused, seconds=10)
    hand_over(store, [worker], [[(other, 0, 16)]])


def test_nobody_listening_releases_the_blocks(store: Store, worker: Worker) -> None:
    gone = Store()
    gone.stop()
    request, other = Request(40, [9, 3, 4]), Request(16, [5])
    worker.step([(request, 0, 40)], gone.target)
    worker.wait_finished(request, seconds=10)
    hand_over(store, [worker], [[(other, 0, 16)]])


def test_a_ticket_that_is_not_valid_releases_the_blocks(store: Store, worker: Worker) -> None:
    request = Request(40, [9, 3, 4])
    session = store.add(request)
    worker.step([(request, 0, 40)], replace(store.target, ticket=new_ticket()))
    worker.wait_finished(request, seconds=10)
    assert worker.exporter.take_unreachable() == [request.session]
    assert not session.kv_bytes


def test_a_data_port_that_does_not_answer_holds_nobody_up(store: Store, worker: Worker) -> None:
    # It takes connections, but not the handshake: as a firewall that drops packets.
    with socket.create_server(("127.0.0.1", 0)) as mute:
        at = Endpoint("tcp", "127.0.0.1", mute.getsockname()[1])
        target = DataTarget(at, "mute", new_ticket())
        lost = [Request(16, [block]) for block in range(8)]
        began = time.monotonic()
        for request in lost:
            worker.step([(request, 0, 16)], target)
        worker.wait_finished(*lost, seconds=4)
        assert 1.5 < time.monotonic() - began < 3.9, "one attempt for all, of stall_timeout"
        assert sorted(worker.exporter.take_unreachable()) == [r.session for r in lost]
        # Another attempt would take two seconds more.
        began = time.monotonic()
        again = Request(16, [9])
        worker.step([(again, 0, 16)], target)
        worker.wait_finished(again, seconds=10)
        assert worker.exporter.take_unreachable() == [again.session]
        # Nor does an attempt that is under way hold up what is ready.
        time.sleep(1.2)
        waiting = Request(16, [10])
        worker.step([(waiting, 0, 16)], target)
        worker.exporter.begin_step([], [waiting.session], {})
        worker.wait_finished(waiting, seconds=10)
    hand_over(store, [worker], [[(Request(40, [9, 3, 4]), 0, 40)]])


def test_a_dead_session_stays_dead(store: Store, worker: Worker) -> None:
    dead, other = Request(40, [9, 3, 4]), Request(16, [5])
    session = store.add(dead)
    worker.exporter.begin_step([], [dead.session], {})
    for number in range(9):
        worker.exporter.begin_step(
            [], list(range(10**6 + 1000 * number, 10**6 + 999 + 1000 * number)), {}
        )
    hand_over(store, [worker], [[(other, 0, 16)]])  # the gathering thread has swept
    worker.step([(dead, 0, 40)], store.target)
    worker.wait_finished(dead)
    hand_over(store, [worker], [[(Request(16, [6]), 0, 16)]])
    assert not session.kv_bytes


def test_a_connection_that_breaks_takes_the_others_with_it(store: Store) -> None:
    # Its blocks are lost: the session cannot complete, and the next one connects anew.
    lost, other = Request(64, [1, 2, 3, 4]), Request(40, [9, 3, 4])
    with workers({"streams": 3, "stall_timeout": 1.0}) as (worker,):
        session = store.add(lost)
        worker.step([(lost, 0, 32)], store.target)
        assert eventually(lambda: session.timeline.blocks_received == 2 * LAYERS)
        connections = list(store.listener._connections)
        assert len(connections) == 3
        connections[1].sock.shutdown(socket.SHUT_RDWR)
        worker.step([(lost, 32, 64)], store.target)
        worker.wait_finished(lost, seconds=4)
        assert eventually(lambda: not store.listener._connections)
        assert len(store.failures) == 1 and "the connection closed" in store.failures[0]
        store.failures.clear()
        hand_over(store, [worker], [[(other, 0, 40)]])


@pytest.mark.parametrize("streams", [1, 3])
def test_a_peer_that_dies_midway_never_holds_blocks_or_kills_a_thread(streams: int) -> None:
    """Any thread may be the one that notices; the next receiver is used again."""
    source = random.Random(3)
    options = {"blocks": 256, "dim": 64, "stall_timeout": 1.0, "staging_mib": 16}
    with workers(options | {"streams": streams}) as (worker,), often_switching_threads():
        for _ in range(12):
            dying = Store(dim=64)
            requests = [Request(1024, source.sample(range(256), 64), dim=64) for _ in range(3)]
            for request in requests[1:]:  # the answer about the first one is due for ever
                dying.add(request)
            worker.step([(request, 0, 1000) for request in requests], dying.target)
            time.sleep(source.uniform(0.0, 0.03))
            dying.stop()
            worker.step([(request, 1000, 1024) for request in requests], dying.target)
            worker.wait_finished(*requests, seconds=4)
        alive = Store(dim=64)
        try:
            hand_over(alive, [worker], [[(Request(40, [9, 3, 4], dim=64), 0, 40)]])
        finally:
            alive.stop()


@contextmanager
def often_switching_threads() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def test_a_peer_that_answers_nonsense_is_given_up(store: Store, worker: Worker) -> None:
    header = Header(kind=Kind.REPLY, session=1, payload_bytes=3).pack()
    for nonsense in (b"HTTP/1.1 400 Bad Request\r\n" * 5, header + b"\xc1\xc1\xc1", b""):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            target = DataTarget(Endpoint("tcp", "127.0.0.1", port), f"other-{port}", new_ticket())
            request = Request(40, [9, 3, 4])
            worker.step([(request, 0, 40)], target)
            connection, _ = server.accept()
            with connection:
                connection.sendall(nonsense)
                if nonsense:
                    worker.wait_finished(request, seconds=10)
            worker.wait_finished(*[] if nonsense else [request], seconds=10)
    hand_over(store, [worker], [[(Request(16, [5]), 0, 16)]])


#: Tokens of a request that no ring of staging buffers holds.
LARGE = 4096


@contextmanager
def large(layers: int) -> Iterator[tuple[Store, Request, dict[str, Any]]]:
    """A store, such a request, and the options of a worker for it."""
    store = Store(layers=layers, dim=64)
    request = Request(LARGE, list(range(256)), layers=layers, dim=64)
    try:
        yield store, request, {"layers": range(layers), "blocks": 256, "dim": 64, "staging_mib": 16}
    finally:
        store.stop()


def test_a_peer_that_does_not_read_costs_bounded_memory_and_time() -> None:
    """64 MiB of KV against 16 MiB of staging."""
    layers = 8
    with large(layers) as (stuck, request, options):
        with workers(options | {"stall_timeout": 1.5}) as (worker,):
            session = stuck.add(request)
            assert eventually(lambda: session.allocated_layers == layers)
            stuck.reading.clear()
            for layer in worker.caches:
                worker.write(layer, request, 0, LARGE)
            before = resident_mib()
            began = time.monotonic()
            worker.step([(request, 0, LARGE)], stuck.target)
            assert time.monotonic() - began < 1.4, "the engine's thread waits for nobody"
            peak = 0
            assert worker.ledger.finished({request.id}) == set()
            while not worker.ledger.finished(set()):
                peak = max(peak, resident_mib() - before)
                assert time.monotonic() - began < 5, "the blocks are still held"
                time.sleep(0.02)
            assert time.monotonic() - began > 1, "it did push back"
            assert peak < 32, f"{peak} MiB more"
            worker.check_alive()


def test_a_peer_that_pauses_gets_everything() -> None:
    with large(4) as (paused, request, options):
        with workers(options | {"stall_timeout": 5.0}) as ranks:
            paused.reading.clear()
            threading.Timer(0.7, paused.reading.set).start()
            hand_over(paused, ranks, [[(request, 0, LARGE)]])


def test_after_a_fault_of_ours_all_blocks_are_free_and_nothing_more_is_sent() -> None:
    """vLLM may reuse the blocks from then on, also those that a GPU has yet to gather."""
    layers, tokens = 8, 4096
    store = Store(layers=layers, dim=64)
    good = Request(tokens, list(range(256)), layers=layers, dim=64)
    bad = Request(32, [0, 9999], layers=layers, dim=64)  # no such block
    with workers({"layers": range(layers), "blocks": 256, "dim": 64}) as (worker,):
        sessions = [store.add(request) for request in (good, bad)]
        worker.step([(good, 0, 16), (bad, 0, 16)], store.target)
        assert eventually(lambda: all(session.kv_bytes for session in sessions))
        store.reading.clear()
        worker.step([(good, 16, tokens)], store.target)
        worker.exporter.begin_step([bad.span(16, 32)], [], {bad.session: store.target})
        worker.exporter.end_step()
        wanted = {good.id, bad.id}
        found = worker.ledger.finished(set(wanted))
        assert eventually(lambda: found.update(worker.ledger.finished(set())) or found == wanted)
        store.reading.set()
        assert not eventually(lambda: bool(store.completed), 1.5)
    assert eventually(lambda: len(store.failures) == 2)
    store.stop()


def test_closing_in_the_middle_is_quick() -> None:
    stuck = Store()
    stuck.reading.clear()
    requests = [Request(64, [1, 2, 3, 4]) for _ in range(4)]
    for request in requests:
        stuck.add(request)
    with workers({"stall_timeout": 1.0}) as (worker,):
        worker.step([(request, 0, 64) for request in requests], stuck.target)
        time.sleep(0.1)
        began = time.monotonic()
    assert time.monotonic() - began < 3
    assert worker.ledger.finished({r.id for r in requests}) == {r.id for r in requests}
    stuck.stop()


def resident_mib() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 >> 20
