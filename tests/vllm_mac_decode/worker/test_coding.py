"""How fast a worker quantises: measured with its own caches, as its exporter reads them."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from mlx_receiver.wire.layout import FULL
from vllm_mac_decode.worker import coding, quantise
from vllm_mac_decode.worker.numbers import Numbers
from vllm_mac_decode.worker.paged_cache import ExportedLayer
from vllm_mac_decode.worker.paged_layout import PagedLayout, PlaneMap

BLOCK, HEADS = 16, 4


def layer(blocks: int = 64, dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> ExportedLayer:
    row = HEADS * 2 * dim
    layout = PagedLayout(
        blocks=blocks,
        block_size=BLOCK,
        heads=HEADS,
        widths=(dim, dim),
        numbers=Numbers(dtype, dtype),
        block_stride=BLOCK * row,
        keys=PlaneMap(0, (2 * dim, row, 1), None),
        values=PlaneMap(dim, (2 * dim, row, 1), None),
    )
    cache = torch.randn(blocks * BLOCK, HEADS, 2 * dim).to(dtype)
    return ExportedLayer(0, cache, layout, 0, FULL, BLOCK)


@pytest.mark.parametrize("blocks", [1, 64])
def test_it_is_what_the_exporter_takes_for_a_piece(
    blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each piece is made to take a known time, beside which its own is little."""
    slow, real, pieces = 0.02, quantise.Quantised.fill, []

    def fill(self: quantise.Quantised, *arguments: Any) -> None:
        pieces.append(threading.current_thread())
        real(self, *arguments)
        time.sleep(slow)

    monkeypatch.setattr(quantise.Quantised, "fill", fill)
    began = time.perf_counter()
    found = coding.measured([layer(blocks)], blocks)
    assert time.perf_counter() - began < 5
    nbytes = blocks * BLOCK * HEADS * 2 * 64 * 2
    for codec in ("q8", "q4"):
        assert 0.05 * nbytes / slow < found[codec] <= nbytes / slow
    assert threading.current_thread() not in pieces and not pieces[0].is_alive()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_codec_has_a_rate(dtype: torch.dtype) -> None:
    one = layer(dtype=dtype)
    before = one.cache.clone()
    found = coding.measured([one], 64)
    assert set(found) == {"q8", "q4"} and all(1e6 < rate < 1e12 for rate in found.values())
    assert torch.equal(one.cache, before), "the cache is read only"


def test_rows_that_cannot_be_quantised_have_none() -> None:
    assert coding.measured([layer(dim=48)], 64) == {}
    assert coding.measured([], 64) == {}
    assert coding.measured([layer(dim=48), layer()], 64), "the first that can"
    assert coding.token_bytes([layer(dim=48), layer()]) == HEADS * 2 * 2 * (48 + 64)


def test_a_cache_that_cannot_be_read_keeps_no_vllm_from_starting() -> None:
    broken = layer(blocks=2)
    assert coding.measured([broken], 64) == {}, "there are no such blocks"


def test_a_machine_without_threads_to_spare_exports_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fails)
    assert coding.measured([layer()], 64) == {}
