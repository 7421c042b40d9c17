"""Attention with a window or in chunks: what leaves is what will be needed, from its own group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from mlx_receiver.caches.chunk import ChunkKV
from mlx_receiver.caches.model import ModelCache
from mlx_receiver.caches.plain import PlainKV
from mlx_receiver.caches.window import WindowKV
from mlx_receiver.wire.layout import (
    CHUNK,
    WINDOW,
    CacheLayout,
    LayerLayout,
    chunked,
    full_attention,
    merged,
    windowed,
)
from mlx_receiver.wire.messages import Open
from mlx_receiver.wire.sampling import Sampling
from tests.vllm_mac_decode.ranks import BLOCK, DIM, HEADS, LAYERS, Request, Store, Worker
from tests.waiting import eventually
from vllm_mac_decode.export import ExportSpan
from vllm_mac_decode.settings import Settings
from vllm_mac_decode.worker.exporter import Exporter

SIZE = 24
#: What such layers have, and how many of 100 tokens they keep: the third chunk of 40 has 20.
KINDS: dict[str, tuple[dict[str, Any], Callable[[LayerLayout], LayerLayout], int]] = {
    "window": ({"kind": WINDOW, "window": SIZE}, lambda layer: windowed(layer, SIZE), SIZE),
    "chunk": ({"kind": CHUNK, "chunk": 40}, lambda layer: chunked(layer, 40), 20),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "steps",
    [[(0, 100)], [(0, 30), (30, 60), (60, 100)], [(0, 76), (76, 100)], [(0, 99), (99, 100)]],
)
def test_only_the_last_tokens_travel(steps: list[tuple[int, int]], kind: str) -> None:
    """Of layers 0 and 2, which have blocks of another group than 1 and 3."""
    fields, described, size = KINDS[kind]
    request = Request(100, [9, 3, 4, 11, 7, 21, 2])
    others = Request(100, [15, 16, 17, 18, 19, 20, 22], session=request.session)
    others.kv, others.id = request.kv, request.id
    worker = Worker()
    worker.exporter.close()
    layers = {
        name: replace(layer, group=1, **fields) if layer.index % 2 == 0 else layer
        for name, layer in worker.exporter._layers.items()
    }
    layout = merged([{layer.index: layer.described() for layer in layers.values()}])
    plain = full_attention(LAYERS, HEADS, DIM, "float32").layers
    assert layout == CacheLayout(
        [described(layer) if i % 2 == 0 else layer for i, layer in enumerate(plain)]
    )
    store = Store()
    store.configure(ModelCache(layout, [PlainKV(), WindowKV(), ChunkKV()]), 1 << 26)
    exporter = Exporter(layers, Settings(), worker.ledger.__class__())
    try:
        opening = Open(request.session, request.id, [1] * 100, Sampling(max_tokens=2))
        session = store.open(opening, store, layout)
        for start, end in steps:
            blocks = [r.span(start, end).block_ids[0] for r in (request, others)]
            # Of tokens that have left the window vLLM keeps nothing but their number.
            first = start // BLOCK
            blocks[1] = [
                block if (first + i + 1) * BLOCK > 100 - size else 0
                for i, block in enumerate(blocks[1])
            ]
            span = ExportSpan(request.session, request.id, start, end, 100, blocks)
            exporter.begin_step([span], [], {request.session: store.target})
            for layer, cache in worker.caches.items():
                worker.write(layer, others if layer % 2 == 0 else request, start, end)
                cache[:BLOCK] = torch.nan  # the void block
                exporter.layer_written(f"layers.{layer}")
            exporter.end_step()
        assert eventually(lambda: request.session in store.completed), store.failures
        assert session.kv_bytes == layout.nbytes(100)
        buffers = session.take_memory()
        for layer in range(LAYERS):
            for plane in range(2):
                kept = (
                    request.kv[layer, plane][:, -size:]
                    if layer % 2 == 0
                    else (request.kv[layer, plane])
                )
                got = torch.from_numpy(buffers.part(layer, plane)[:, : kept.shape[1]].copy())
                assert torch.equal(got.view(torch.float32), kept)
        assert not store.failures
    finally:
        exporter.close()
        store.stop()
