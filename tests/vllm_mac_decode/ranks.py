"""A receiver's store, a prompt and a rank, for the exporter's tests."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mlx_receiver.caches.model import ModelCache
from mlx_receiver.caches.plain import PlainKV
from mlx_receiver.metrics import Metrics
from mlx_receiver.sessions.session import Session
from mlx_receiver.sessions.store import SessionStore
from mlx_receiver.transports.tcp import TcpTransport
from mlx_receiver.transports.transport import Landing
from mlx_receiver.wire.frames import Header
from mlx_receiver.wire.keys import new_ticket
from mlx_receiver.wire.layout import FULL, full_attention
from mlx_receiver.wire.messages import Endpoint, Open
from mlx_receiver.wire.quantised import RAW
from mlx_receiver.wire.sampling import Sampling
from tests.waiting import eventually
from vllm_mac_decode.export import DataTarget, ExportSpan
from vllm_mac_decode.settings import Settings
from vllm_mac_decode.worker.exporter import Exporter
from vllm_mac_decode.worker.ledger import BlockLedger
from vllm_mac_decode.worker.numbers import Numbers
from vllm_mac_decode.worker.paged_cache import ExportedLayer
from vllm_mac_decode.worker.paged_layout import PagedLayout, PlaneMap

LAYERS, HEADS, DIM, BLOCK = 4, 4, 16, 16

_ids = itertools.count(1)


class Store(SessionStore):
    """The receiver's own store behind its own listener, which can stop to read or be slow."""

    def __init__(self, layers: int = LAYERS, dim: int = DIM) -> None:
        super().__init__(max_sessions=64, events=self, metrics=Metrics())
        self.layout = full_attention(layers, HEADS, dim, "float32")
        self.configure(ModelCache(self.layout, [PlainKV()]), 1 << 30)
        self.completed: set[int] = set()
        self.failures: list[str] = []
        self.reading = threading.Event()
        self.reading.set()
        self.pace = 0.0
        ticket = new_ticket()
        self.id = ticket.client  # every session's owner
        self.admit(ticket)
        self.listener = TcpTransport().listen("127.0.0.1", 0, self)
        port = self.listener.endpoint.port
        self.target = DataTarget(Endpoint("tcp", "127.0.0.1", port), f"store-{port}", ticket)

    def opened(self, session: Session) -> None: ...

    def complete(self, session: Session) -> None:
        self.completed.add(session.id)

    def failed(self, session: Session, code: str, reason: str) -> None:
        self.failures.append(reason)

    def landing(self, client: str, header: Header) -> Landing:
        self.reading.wait(20)
        if self.pace:
            time.sleep(self.pace)
        return super().landing(client, header)

    def add(self, request: Request) -> Session:
        prompt, once = [1] * request.tokens, Sampling(max_tokens=1)
        message = Open(request.session, request.id, prompt, once, request.codec)
        return self.open(message, self, self.layout)

    def stop(self) -> None:
        self.reading.set()
        self.listener.close()
        self.close()


@dataclass
class Request:
    """A prompt's K and V ``[layers, 2, heads, tokens, dim]`` and the blocks that will hold them."""

    tokens: int
    blocks: list[int]
    layers: int = LAYERS
    dim: int = DIM
    codec: str = RAW
    session: int = field(default_factory=lambda: next(_ids))
    from_end: bool = False

    def __post_init__(self) -> None:
        self.id = f"request-{self.session}"
        shape = (self.layers, 2, HEADS, self.tokens, self.dim)
        self.kv = torch.randn(shape, generator=torch.Generator().manual_seed(self.session))

    def span(self, start: int, end: int, block_size: int = BLOCK) -> ExportSpan:
        blocks = self.blocks[start // block_size : -(-end // block_size)]
        return ExportSpan(
            self.session,
            self.id,
            start,
            end,
            self.tokens,
            [blocks],
            self.codec,
            self.from_end,
        )

    def check(self, session: Session) -> None:
        """Every byte of it is in the session's memory."""
        buffers = session.take_memory()
        for layer in range(self.layers):
            for plane in range(2):
                got = buffers.part(layer, plane)[:, : self.tokens].view(np.float32)
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
            widths=(dim, dim),
            numbers=Numbers(torch.float32, torch.float32),
            block_stride=kernel_block * row,
            keys=PlaneMap(0, (2 * dim, row, 1), None),
            values=PlaneMap(dim, (2 * dim, row, 1), None),
        )
        self.caches = {layer: torch.full(shape, torch.nan) for layer in layers}
        exported = {
            f"layers.{layer}": ExportedLayer(layer, cache, layout, heads.start, FULL, block_size)
            for layer, cache in self.caches.items()
        }
        self.ledger = BlockLedger()
        self.exporter = Exporter(exported, Settings(**settings), self.ledger)

    def write(self, layer: int, request: Request, start: int, end: int) -> None:
        """What the backend's cache update does."""
        tokens = torch.arange(start, end)
        blocks = torch.tensor(request.blocks)[tokens // self.block_size]
        slots = blocks * self.block_size + tokens % self.block_size
        part = request.kv[layer, :, self.heads.start : self.heads.stop, start:end]
        self.caches[layer][slots] = torch.cat([part[0], part[1]], dim=-1).transpose(0, 1)

    def step(
        self, work: list[tuple[Request, int, int]], *targets: DataTarget, hooks: int = 1
    ) -> None:
        """One forward pass; the sessions take the targets in turn. ``hooks`` says how often vLLM
        calls a layer's hook."""
        spans = [request.span(start, end, self.block_size) for request, start, end in work]
        where = zip(spans, itertools.cycle(targets), strict=False)
        self.exporter.begin_step(spans, [], {span.session: target for span, target in where})
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
        found = self.ledger.finished(set(wanted))
        until = time.monotonic() + seconds
        while found != wanted:
            assert time.monotonic() < until, f"still held after {seconds} s: {wanted - found}"
            time.sleep(0.005)
            found |= self.ledger.finished(set())
        self.check_alive()

    def check_alive(self) -> None:
        """All threads still run."""
        alive = {thread.name for thread in threading.enumerate()}
        assert all(thread.is_alive() for thread in self.exporter.threads), alive


@contextmanager
def workers(*options: dict[str, Any]) -> Iterator[list[Worker]]:
    made = [Worker(**o) for o in options]
    try:
        yield made
    finally:
        for worker in made:
            worker.exporter.close()


def hand_over(
    store: Store, ranks: list[Worker], steps: list[list[tuple[Request, int, int]]], **how: Any
) -> None:
    """Run the steps on every rank; all sessions complete with the right bytes."""
    requests = {request.session: request for step in steps for request, _, _ in step}.values()
    sessions = {request.session: store.add(request) for request in requests}
    for step in steps:
        for rank in ranks:
            rank.step(step, store.target, **how)
    for rank in ranks:
        rank.wait_finished(*requests)
        rank.overwrite()
    assert eventually(lambda: store.completed >= sessions.keys())
    for request in requests:
        request.check(sessions[request.session])
    assert not store.failures
