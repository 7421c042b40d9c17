"""What is sent quantised is what MLX would have made of it, and lands as MLX reads it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from mlx_receiver.wire.quantised import row_bytes
from tests.quantised import (
    LARGEST,
    as_mlx,
    from_integers,
    integers,
    payload,
    rows,
    same,
    there_and_back,
)
from tests.vllm_mac_decode.ranks import HEADS, Request, Store, hand_over, workers
from tests.waiting import eventually
from vllm_mac_decode.worker.paged_cache import PagedPart
from vllm_mac_decode.worker.quantise import Quantised, Scratch, quantise

DIM = 64


def quantised(numbers: torch.Tensor, codec: str) -> bytes:
    heads, tokens, width = numbers.shape
    dtype = str(numbers.dtype).removeprefix("torch.")
    out = torch.full((heads * tokens * row_bytes(codec, dtype, width),), 0xAA, dtype=torch.uint8)
    quantise(numbers, codec, out)
    return out.numpy().tobytes()


def as_torch(numbers: np.ndarray, dtype: str) -> torch.Tensor:
    """By MLX's rounding."""
    carriers = integers(as_mlx(numbers, dtype))
    signed = carriers.view(np.dtype(f"i{carriers.itemsize}"))
    return torch.from_numpy(signed).view(getattr(torch, dtype))


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("codec", ["q8", "q4"])
def test_every_byte_is_mlx_s(codec: str, dtype: str) -> None:
    for name, numbers in rows(dtype):
        kept = as_torch(numbers[None], dtype)
        before = kept.clone()
        got, wanted = quantised(kept, codec), payload(as_mlx(numbers[None], dtype), codec)
        assert torch.equal(kept.view(torch.uint8), before.view(torch.uint8)), "it was changed"
        ends = len(numbers) * 2 * kept.dtype.itemsize
        assert got[:-ends] == wanted[:-ends], name
        bits = np.dtype(f"u{kept.dtype.itemsize}")
        scales = [np.frombuffer(data[-ends:], bits) for data in (got, wanted)]
        assert same(*scales, dtype), name


def test_a_group_with_a_nan_is_none() -> None:
    numbers = torch.randn(1, 3, DIM)
    numbers[0, 1, 7] = torch.nan
    size = row_bytes("q8", "float32", DIM)
    out = np.frombuffer(quantised(numbers, "q8"), np.float32)[-6:]
    assert len(quantised(numbers, "q8")) == 3 * size
    assert np.isnan(out).tolist() == [False, True, False] * 2


def test_parts_that_cannot_be_quantised_travel_as_they_are() -> None:
    """Rows of 96, 8-bit floats and halves side by side, of rows 3 to 9 of 16."""
    parts = [
        PagedPart("odd", 2, 96, "bfloat16"),
        PagedPart("keys", 2, 128, "bfloat16"),
        PagedPart("narrow", 2, 64, "float8_e4m3"),
        PagedPart("wide", 1, 64, "float32"),
    ]
    content = Quantised(parts, "q4", 16, 3, 9)
    assert [codec for _, codec, *_ in content.places] == ["raw", "q4", "raw", "q4"]
    whole = torch.cat([part_bytes(part, 16) for part in parts])
    out = torch.zeros(content.nbytes, dtype=torch.uint8)
    content.fill(lambda raw: raw.copy_(whole), Scratch(), out)
    start = 0
    for part, codec, begin, end in content.places:
        raw = whole[start : start + part.nbytes(16)].view(part.heads, 16, -1)[:, 3:9]
        start += part.nbytes(16)
        wanted = raw.contiguous().numpy().tobytes()
        if codec != "raw":
            wanted = quantised(raw.contiguous().view(getattr(torch, part.dtype)), codec)
        assert out[begin:end].numpy().tobytes() == wanted, part.name


def part_bytes(part: PagedPart, rows: int) -> torch.Tensor:
    if part.dtype.startswith("float8"):
        return torch.randint(0, 256, (part.nbytes(rows),), dtype=torch.uint8)
    numbers = torch.randn(part.heads, rows, part.width).to(getattr(torch, part.dtype))
    return numbers.view(torch.uint8).flatten()


# --- from a paged cache to a receiver's memory --------------------------------------------------


@pytest.fixture
def store() -> Iterator[Store]:
    made = Store(dim=DIM)
    yield made
    made.stop()


@pytest.mark.parametrize("codec", ["q8", "q4"])
@pytest.mark.parametrize("cuts", [[], [1, 2, 17], [20]])
@pytest.mark.parametrize("from_end", [False, True])
def test_an_export_by_two_workers(
    store: Store, codec: str, cuts: list[int], from_end: bool
) -> None:
    request = Request(50, [12, 11, 30, 31], dim=DIM, codec=codec, from_end=from_end)
    half = HEADS // 2
    with workers(*({"heads": range(h, h + half), "dim": DIM} for h in (0, half))) as ranks:
        session = store.add(request)
        for start, end in itertools.pairwise([0, *cuts, 50]):
            for rank in ranks:
                rank.step([(request, start, end)], store.target)
        for rank in ranks:
            rank.wait_finished(request)
            rank.overwrite()
        assert eventually(lambda: request.session in store.completed), store.failures
    assert session.kv_bytes == request.kv.nbytes
    buffers = session.take_memory()
    for layer, plane in itertools.product(range(request.layers), range(2)):
        sent = request.kv[layer, plane].numpy().view(np.uint32)
        wanted = integers(there_and_back(from_integers(sent, "float32"), codec))
        assert np.array_equal(buffers.part(layer, plane)[:, :50], wanted), (layer, plane)


def test_what_cannot_be_quantised_is_sent_as_it_is() -> None:
    narrow = Store()  # rows of 16 numbers
    request = Request(50, [12, 11, 30, 31], codec="q4")
    try:
        with workers({}) as ranks:
            hand_over(narrow, ranks, [[(request, 0, 50)]])
    finally:
        narrow.stop()


@pytest.mark.parametrize(("agreed", "sent"), [("q8", "raw"), ("raw", "q8"), ("q4", "q8")])
def test_what_was_not_agreed_fails_the_session(store: Store, agreed: str, sent: str) -> None:
    request = Request(20, [3, 4], dim=DIM, codec=agreed)
    with workers({"dim": DIM}) as (worker,):
        store.add(request)
        request.codec = sent
        worker.step([(request, 0, 20)], store.target)
        assert eventually(lambda: bool(store.failures))
        assert f"it is {sent}, agreed was {agreed}" in store.failures[0]
        worker.wait_finished(request)


def test_a_gpu_without_memory_to_quantise_in_gives_the_session_up(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("the GPU's is all taken")

    first, second = (Request(20, [3, 4], dim=DIM, codec="q8") for _ in range(2))
    with workers({"dim": DIM, "staging_mib": 16}) as (worker,):
        for request in (first, second):
            store.add(request)
        with monkeypatch.context() as patched:
            patched.setattr("vllm_mac_decode.worker.quantise.quantise", full)
            worker.step([(first, 0, 20)], store.target)
            worker.wait_finished(first)
            assert worker.exporter.take_unreachable() == [first.session]
        worker.step([(second, 0, 20)], store.target)
        worker.wait_finished(second)
        assert eventually(lambda: second.session in store.completed), store.failures
