"""The export reads a kind of cache that nobody has: it needs nothing but a ``PagedCache``."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mlx_receiver.caches.model import ModelCache
from mlx_receiver.wire.layout import CacheLayout, LayerLayout, Part, full_attention, merged
from mlx_receiver.wire.messages import Open
from mlx_receiver.wire.sampling import Sampling
from tests.mlx_receiver.caches.test_cache_kinds import Odd
from tests.vllm_mac_decode.ranks import Store
from tests.waiting import eventually
from vllm_mac_decode.export import ExportSpan
from vllm_mac_decode.settings import Settings
from vllm_mac_decode.worker.exporter import Exporter
from vllm_mac_decode.worker.ledger import BlockLedger
from vllm_mac_decode.worker.paged_cache import ExportedLayer, PagedPart

WIDTHS, BLOCK, BLOCKS, TOKENS = (6, 3), 4, 9, 18


class Paged:
    """``[blocks, block, 6 + 3]``: a latent and another array of it, side by side."""

    block_size = BLOCK
    parts = (PagedPart("latent", 1, 6, "float32"), PagedPart("rope", 1, 3, "float32"))

    def read(self, cache: torch.Tensor, block_ids: torch.Tensor, out: torch.Tensor) -> None:
        pieces = cache[block_ids].split(WIDTHS, dim=-1)
        out.view(torch.float32).copy_(torch.cat([piece.flatten() for piece in pieces]))


def test_parts_of_different_widths() -> None:
    caches = [torch.randn((BLOCKS, BLOCK, sum(WIDTHS))) for _ in range(2)]
    layers = {
        f"layers.{i}": ExportedLayer(i, cache, Paged(), 0, "odd", BLOCK)
        for i, cache in enumerate(caches)
    }
    layout = merged([{layer.index: layer.described() for layer in layers.values()}])
    assert layout.layers[0] == LayerLayout(
        "odd", [Part("latent", 1, 6, "float32"), Part("rope", 1, 3, "float32")]
    )
    store = Store()
    store.configure(ModelCache(layout, [Odd()]), 1 << 24)
    exporter = Exporter(layers, Settings(), BlockLedger())
    try:
        session = store.open(Open(3, "r", [1] * TOKENS, Sampling(max_tokens=2)), store, layout)
        ids = [8, 2, 3, 5, 1]
        exporter.begin_step([ExportSpan(3, "r", 0, TOKENS, TOKENS, [ids])], [], {3: store.target})
        for name in layers:
            exporter.layer_written(name)
        exporter.end_step()
        assert eventually(lambda: 3 in store.completed), store.failures
        built = session.take_memory().build()
        for got, cache in zip(built, caches, strict=True):
            written = cache[ids].reshape(-1, sum(WIDTHS))[:TOKENS].numpy()
            np.testing.assert_array_equal(got[0][0], written[:, : WIDTHS[0]])
            np.testing.assert_array_equal(got[1][0], written[:, WIDTHS[0] :])
    finally:
        exporter.close()
        store.stop()


def test_workers_pieces_make_the_models_layout() -> None:
    def piece(layers: range, heads: int) -> dict[int, LayerLayout]:
        return dict(
            enumerate(full_attention(4, heads, 8, "float32").layers[: len(layers)], layers.start)
        )

    whole = full_attention(4, 8, 8, "float32")
    # Two ranks that hold four heads each, and two stages of two layers.
    ranks = [piece(range(0, 2), 4), piece(range(0, 2), 8), piece(range(2, 4), 8), {}]
    assert merged(ranks) == CacheLayout(whole.layers)
    with pytest.raises(ValueError, match=r"no worker holds layers 0\.\.1"):
        merged([piece(range(2, 4), 8)])
    with pytest.raises(ValueError, match="no worker holds layer 0"):
        merged([{}])
