"""From a paged cache to a receiver's memory: every byte, in time, or given up cleanly."""

from __future__ import annotations

import itertools
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlx_receiver import store as store_module
from mlx_receiver.cache import PlainKV
from mlx_receiver.metrics import Metrics
from mlx_receiver.session import Session
from mlx_receiver.store import SessionStore
from mlx_receiver.wire.frames import Header, Kind, Plane
from mlx_receiver.wire.messages import Endpoint, Open, Sampling
from mlx_receiver.wire.signature import ModelSignature
from mlx_receiver.wire.tcp import TcpTransport
from mlx_receiver.wire.transport import Landing
from vllm_mac_decode.exporter import ExportedLayer, Exporter
from vllm_mac_decode.metadata import BulkTarget, ExportSpan
from vllm_mac_decode.paged_layout import PagedLayout, PlaneMap
from vllm_mac_decode.settings import Settings

LAYERS, HEADS, DIM, BLOCK = 4, 4, 16, 16
TOKEN = "secret"

_ids = itertools.count(1)


class Store(SessionStore):
    """The receiver's own store behind its own listener, which can stop to read or be slow."""

    def __init__(self, layers: int = LAYERS, dim: int = DIM) -> None:
        signature = ModelSignature("llama", layers, HEADS, dim, 64, 100, [])
        super().__init__(
            PlainKV(), signature, max_sessions=64, token=TOKEN, events=self, metrics=Metrics()
        )
        self.configure("float32", 1 << 30)
        self.completed: set[int] = set()
        self.failures: list[str] = []
        self.reading = threading.Event()
        self.reading.set()
        self.pace = 0.0
        self.listener = TcpTransport().listen("127.0.0.1", 0, self)
        port = self.listener.endpoint.port
        self.target = BulkTarget(Endpoint("tcp", "127.0.0.1", port), f"store-{port}", "test")

    def opened(self, session: Session) -> None: ...

    def complete(self, session: Session) -> None:
        self.completed.add(session.id)

    def failed(self, session: Session, code: str, reason: str) -> None:
        self.failures.append(reason)

    def landing(self, header: Header) -> Landing:
        self.reading.wait(20)
        if self.pace:
            time.sleep(self.pace)
        return super().landing(header)

    def admit(self, request: Request) -> Session:
        message = Open(request.session, request.id, [1] * request.tokens, Sampling(max_tokens=1))
        return self.open(message, self, "float32")

    def stop(self) -> None:
        self.reading.set()
        self.listener.close()
        self.close()


@pytest.fixture
def store() -> Iterator[Store]:
    made = Store()
    yield made
    made.stop()


@dataclass
class Request:
    """A prompt's K and V ``[layers, 2, heads, tokens, dim]`` and the blocks that will hold them."""

    tokens: int
    blocks: list[int]
    layers: int = LAYERS
    dim: int = DIM
    session: int = field(default_factory=lambda: next(_ids))

    def __post_init__(self) -> None:
        self.id = f"request-{self.session}"
        shape = (self.layers, 2, HEADS, self.tokens, self.dim)
        self.kv = torch.randn(shape, generator=torch.Generator().manual_seed(self.session))

    def span(self, start: int, end: int, block_size: int = BLOCK) -> ExportSpan:
        blocks = self.blocks[start // block_size : -(-end // block_size)]
        return ExportSpan(self.session, self.id, start, end, blocks)

    def check(self, session: Session) -> None:
        """Every byte of it is in the session's memory."""
        buffers = session.take_memory()
        for layer in range(self.layers):
            for plane in Plane:
                got = buffers.plane(layer, plane)[:, : self.tokens].view(np.float32)
                assert np.array_equal(got, self.kv[layer, plane].numpy()), (layer, plane)


class Worker:
    """A rank's paged caches ``[blocks, block, heads, 2 * dim]`` and its exporter."""

    def __init__(
        self,
        *,
        layers: range = range(LAYERS),
        heads: range = range(HEADS),
        blocks: int = 40,
        block_size: int = BLOCK,
        kernel_block: int = BLOCK,
        dim: int = DIM,
        **settings: Any,
    ) -> None:
        self.heads, self.block_size, self.dim = heads, block_size, dim
        shape = (blocks * block_size, len(heads), 2 * dim)
        row = len(heads) * 2 * dim
        layout = PagedLayout(
            blocks=blocks * block_size // kernel_block,
            block_size=kernel_block,
            heads=len(heads),
            head_dim=dim,
            block_stride=kernel_block * row,
            keys=PlaneMap(0, (2 * dim, row, 1), None),
            values=PlaneMap(dim, (2 * dim, row, 1), None),
        )
        self.caches = {layer: torch.full(shape, torch.nan) for layer in layers}
        exported = {
            f"layers.{layer}": ExportedLayer(layer, cache, layout, heads.start)
            for layer, cache in self.caches.items()
        }
        self.exporter = Exporter(exported, block_size, Settings(token=TOKEN, **settings))

    def write(self, layer: int, request: Request, start: int, end: int) -> None:
        """What the backend's cache update does."""
        tokens = torch.arange(start, end)
        blocks = torch.tensor(request.blocks)[tokens // self.block_size]
        slots = blocks * self.block_size + tokens % self.block_size
        part = request.kv[layer, :, self.heads.start : self.heads.stop, start:end]
        self.caches[layer][slots] = torch.cat([part[0], part[1]], dim=-1).transpose(0, 1)

    def step(
        self, work: list[tuple[Request, int, int]], target: BulkTarget, hooks: int = 1
    ) -> None:
        """One forward pass; ``hooks`` says how often vLLM calls a layer's hook."""
        spans = [request.span(start, end, self.block_size) for request, start, end in work]
        self.exporter.begin_step(spans, [], target)
        for layer in self.caches:
            for request, start, end in work:
                self.write(layer, request, start, end)
            for _ in range(hooks):
                self.exporter.layer_written(f"layers.{layer}")
        self.exporter.end_step()

    def overwrite(self) -> None:
        """vLLM gives the blocks to somebody else."""
        for cache in self.caches.values():
            cache.fill_(torch.nan)

    def wait_finished(self, *requests: Request, seconds: float = 10.0) -> None:
        """What vLLM asks after each step, until every request's blocks may be freed."""
        wanted = {request.id for request in requests}
        found = self.exporter.finished(set(wanted))
        until = time.monotonic() + seconds
        while found != wanted:
            assert time.monotonic() < until, f"still held after {seconds} s: {wanted - found}"
            time.sleep(0.005)
            found |= self.exporter.finished(set())
        self.check_alive()

    def check_alive(self) -> None:
        """Both threads still run."""
        alive = {thread.name for thread in threading.enumerate()}
        assert all(thread.is_alive() for thread in self.exporter._threads), alive


@contextmanager
def workers(*options: dict[str, Any]) -> Iterator[list[Worker]]:
    made = [Worker(**o) for o in options]
    try:
        yield made
    finally:
        for worker in made:
            worker.exporter.close()


@pytest.fixture
def worker() -> Iterator[Worker]:
    with workers({}) as (made,):
        yield made


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def hand_over(
    store: Store, ranks: list[Worker], steps: list[list[tuple[Request, int, int]]], **how: Any
) -> None:
    """Run the steps on every rank; all sessions complete with the right bytes."""
    requests = {request.session: request for step in steps for request, _, _ in step}.values()
    sessions = {request.session: store.admit(request) for request in requests}
    for step in steps:
        for rank in ranks:
            rank.step(step, store.target, **how)
    for rank in ranks:
        rank.wait_finished(*requests)
        rank.overwrite()
    wait_until(lambda: store.completed >= sessions.keys())
    for request in requests:
        request.check(sessions[request.session])
    assert not store.failures


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


def test_several_requests_in_one_step(store: Store, worker: Worker) -> None:
    a, b, c = Request(33, [0, 5, 2]), Request(5, [7]), Request(64, [20, 21, 22, 39])
    hand_over(store, [worker], [[(a, 0, 20), (b, 0, 5)], [(a, 20, 33), (c, 0, 50)], [(c, 50, 64)]])


@pytest.mark.parametrize("hooks", [0, 2])
def test_hooks_that_never_or_twice_run(store: Store, worker: Worker, hooks: int) -> None:
    # A replayed CUDA graph calls none; some layers are announced before and after attention.
    request = Request(40, [9, 3, 4])
    session = store.admit(request)
    worker.step([(request, 0, 40)], store.target, hooks=hooks)
    wait_until(lambda: session.complete)
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
    sessions = [store.admit(first), store.admit(second)]
    worker.step([(first, 0, 64)], store.target)
    worker.wait_finished(first)
    worker.overwrite()
    assert not sessions[0].complete
    worker.step([(second, 0, 64)], store.target)
    worker.wait_finished(second)
    worker.overwrite()
    wait_until(lambda: sessions[0].complete and sessions[1].complete)
    first.check(sessions[0])
    second.check(sessions[1])


def test_blocks_wait_until_the_session_is_accepted(store: Store, worker: Worker) -> None:
    request = Request(40, [9, 3, 4])
    worker.step([(request, 0, 40)], store.target)
    time.sleep(0.1)
    assert worker.exporter.finished({request.id}) == set(), "the receiver has not heard of it"
    session = store.admit(request)
    worker.wait_finished()
    wait_until(lambda: session.complete)
    wait_until(lambda: worker.exporter.finished(set()) == {request.id})
    request.check(session)


def test_a_session_that_ends_unaccepted_releases_its_blocks(store: Store, worker: Worker) -> None:
    given_up, other = Request(40, [9, 3, 4]), Request(16, [5])
    worker.step([(given_up, 0, 40)], store.target)
    assert worker.exporter.finished({given_up.id}) == set()
    worker.exporter.begin_step([], [given_up.session], None)
    wait_until(lambda: worker.exporter.finished(set()) == {given_up.id})
    hand_over(store, [worker], [[(other, 0, 16)]])


def test_a_refused_session_releases_its_blocks(
    store: Store, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "ATTACH_SECONDS", 0.1)
    refused, other = Request(40, [9, 3, 4]), Request(16, [5])
    worker.step([(refused, 0, 40)], store.target)
    time.sleep(0.3)
    store.sweep()  # nobody opened the session in time
    worker.wait_finished(refused, seconds=2)
    # Later chunks of it are given up at once.
    worker.step([(refused, 0, 40)], store.target)
    worker.wait_finished(refused, seconds=2)
    hand_over(store, [worker], [[(other, 0, 16)]])


def test_nobody_listening_releases_the_blocks(store: Store, worker: Worker) -> None:
    gone = Store()
    gone.stop()
    request, other = Request(40, [9, 3, 4]), Request(16, [5])
    worker.step([(request, 0, 40)], gone.target)
    worker.wait_finished(request, seconds=2)
    hand_over(store, [worker], [[(other, 0, 16)]])


def test_a_wrong_token_releases_the_blocks(store: Store) -> None:
    store._token = "another"
    request = Request(40, [9, 3, 4])
    store.admit(request)
    with workers({}) as (worker,):
        worker.step([(request, 0, 40)], store.target)
        worker.wait_finished(request, seconds=2)


def test_a_peer_that_dies_midway_never_holds_blocks_or_kills_a_thread() -> None:
    """Either thread may be the one that notices; the next receiver is used again."""
    source = random.Random(3)
    options = {"blocks": 256, "dim": 64, "stall_timeout": 1.0, "staging_mib": 16}
    with workers(options) as (worker,), often_switching_threads():
        for _ in range(12):
            dying = Store(dim=64)
            requests = [Request(1024, source.sample(range(256), 64), dim=64) for _ in range(3)]
            for request in requests[1:]:  # the answer about the first one is due for ever
                dying.admit(request)
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
            target = BulkTarget(Endpoint("tcp", "127.0.0.1", port), f"other-{port}", "test")
            request = Request(40, [9, 3, 4])
            worker.step([(request, 0, 40)], target)
            connection, _ = server.accept()
            with connection:
                connection.sendall(nonsense)
                if nonsense:
                    worker.wait_finished(request, seconds=3)
            worker.wait_finished(*[] if nonsense else [request], seconds=3)
    hand_over(store, [worker], [[(Request(16, [5]), 0, 16)]])


def test_a_peer_that_does_not_read_costs_bounded_memory_and_time() -> None:
    """64 MiB of KV against 16 MiB of staging."""
    layers, tokens = 8, 4096
    stuck = Store(layers=layers, dim=64)
    request = Request(tokens, list(range(256)), layers=layers, dim=64)
    options = {"layers": range(layers), "blocks": 256, "dim": 64, "staging_mib": 16}
    try:
        with workers(options | {"stall_timeout": 1.5}) as (worker,):
            session = stuck.admit(request)
            wait_until(lambda: bool(session.timeline.allocated_ns))
            stuck.reading.clear()
            for layer in worker.caches:
                worker.write(layer, request, 0, tokens)
            before = resident_mib()
            began = time.monotonic()
            worker.step([(request, 0, tokens)], stuck.target)
            assert time.monotonic() - began < 0.5, "the engine's thread waits for nobody"
            peak = 0
            assert worker.exporter.finished({request.id}) == set()
            while not worker.exporter.finished(set()):
                peak = max(peak, resident_mib() - before)
                assert time.monotonic() - began < 5, "the blocks are still held"
                time.sleep(0.02)
            assert time.monotonic() - began > 1, "it did push back"
            assert peak < 32, f"{peak} MiB more"
            worker.check_alive()
    finally:
        stuck.stop()


def test_a_peer_that_pauses_gets_everything() -> None:
    layers, tokens = 4, 4096
    paused = Store(layers=layers, dim=64)
    request = Request(tokens, list(range(256)), layers=layers, dim=64)
    options = {"layers": range(layers), "blocks": 256, "dim": 64, "staging_mib": 16}
    try:
        with workers(options | {"stall_timeout": 5.0}) as ranks:
            paused.reading.clear()
            threading.Timer(0.7, paused.reading.set).start()
            hand_over(paused, ranks, [[(request, 0, tokens)]])
    finally:
        paused.stop()


def test_closing_in_the_middle_is_quick() -> None:
    stuck = Store()
    stuck.reading.clear()
    requests = [Request(64, [1, 2, 3, 4]) for _ in range(4)]
    for request in requests:
        stuck.admit(request)
    with workers({"stall_timeout": 1.0}) as (worker,):
        worker.step([(request, 0, 64) for request in requests], stuck.target)
        time.sleep(0.1)
        began = time.monotonic()
    assert time.monotonic() - began < 3
    assert worker.exporter.finished({r.id for r in requests}) == {r.id for r in requests}
    stuck.stop()


def resident_mib() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 >> 20
