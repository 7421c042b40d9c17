"""The probe finds every (token, head, dim) of K and V, or says that it cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_mac_decode.worker.numbers import Numbers
from vllm_mac_decode.worker.paged_cache import LayoutError
from vllm_mac_decode.worker.paged_layout import (
    CacheUpdate,
    PagedLayout,
    layer_update,
    probe,
    runs,
)

BLOCKS = 11
HEADS = 3
SCATTERED = [[7, 2, 9], [3, 4, 5, 6], [8, 8, 1, 8], [10], [0, 1, 5, 6, 2]]


@dataclass
class Case:
    """A cache, how a backend writes it, and the scheduler's view of it."""

    cache: torch.Tensor
    update: CacheUpdate
    head_dim: int
    block_size: int = 32
    num_blocks: int = BLOCKS
    heads: int = HEADS
    numbers: Numbers | None = None

    def probe(self) -> PagedLayout:
        dtype = self.cache.dtype
        return probe(
            self.cache,
            self.num_blocks,
            self.block_size,
            self.heads,
            (self.head_dim, self.head_dim),
            self.update,
            self.numbers or Numbers(dtype, dtype),
        )


def blockwise(
    place: Callable[[torch.Tensor, int, int, torch.Tensor, torch.Tensor], None], block_size: int
) -> CacheUpdate:
    """A backend that writes one token at a time: ``place(cache, block, row, key, value)``."""

    def update(k: torch.Tensor, v: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
        for token, slot in enumerate(slots.tolist()):
            place(cache, slot // block_size, slot % block_size, k[token], v[token])

    return update


def nhd_interleaved(dtype: torch.dtype = torch.bfloat16, head_dim: int = 64) -> Case:
    """CUDA's FLASH_ATTN: logical [blocks, heads, block, 2 * dim] over NHD strides."""
    cache = torch.zeros(BLOCKS, 32, HEADS, 2 * head_dim, dtype=dtype).permute(0, 2, 1, 3)

    def place(cache: torch.Tensor, b: int, t: int, k: torch.Tensor, v: torch.Tensor) -> None:
        cache[b, :, t, :head_dim] = k
        cache[b, :, t, head_dim:] = v

    return Case(cache, blockwise(place, 32), head_dim)


def outer_planes() -> Case:
    """[2, blocks, block, heads, dim]: K and V far apart."""
    cache = torch.zeros(2, BLOCKS, 32, HEADS, 64, dtype=torch.float16)

    def place(cache: torch.Tensor, b: int, t: int, k: torch.Tensor, v: torch.Tensor) -> None:
        cache[0, b, t], cache[1, b, t] = k, v

    return Case(cache, blockwise(place, 32), 64)


def head_major() -> Case:
    """[blocks, 2, heads, block, dim]."""
    cache = torch.zeros(BLOCKS, 2, HEADS, 32, 80)

    def place(cache: torch.Tensor, b: int, t: int, k: torch.Tensor, v: torch.Tensor) -> None:
        cache[b, 0, :, t], cache[b, 1, :, t] = k, v

    return Case(cache, blockwise(place, 32), 80)


def in_a_shared_storage() -> Case:
    """A layer's blocks inside one allocation of several layers, not at its start."""
    whole = torch.zeros(BLOCKS, 4, 32, HEADS, 2 * 64, dtype=torch.bfloat16)
    inner = nhd_interleaved()
    return Case(whole[:, 2].permute(0, 2, 1, 3), inner.update, 64)


def vnni_packed(dtype: torch.dtype = torch.bfloat16) -> Case:
    """As for AMX tiles: K by pairs of dims across tokens, V by pairs of tokens across dims."""
    cache = torch.zeros(BLOCKS, HEADS, 2, 32 * 64, dtype=dtype)
    dims = torch.arange(64)

    def place(cache: torch.Tensor, b: int, t: int, k: torch.Tensor, v: torch.Tensor) -> None:
        cache[b, :, 0, dims // 2 * (2 * 32) + 2 * t + dims % 2] = k
        cache[b, :, 1, t // 2 * (2 * 64) + 2 * dims + t % 2] = v

    return Case(cache, blockwise(place, 32), 64)


def kernel_blocks() -> Case:
    """The kernel's block is a quarter of the scheduler's."""
    cache = torch.zeros(4 * BLOCKS, HEADS, 16, 2 * 64, dtype=torch.bfloat16)

    def place(cache: torch.Tensor, b: int, t: int, k: torch.Tensor, v: torch.Tensor) -> None:
        cache[b, :, t, :64], cache[b, :, t, 64:] = k, v

    return Case(cache, blockwise(place, 16), 64, block_size=64)


LAYOUTS: list[Callable[[], Case]] = [
    nhd_interleaved,
    lambda: nhd_interleaved(torch.float32, 128),
    outer_planes,
    head_major,
    in_a_shared_storage,
    vnni_packed,
    kernel_blocks,
]


@pytest.fixture(scope="module")
def vllm_cpu() -> Iterator[Any]:
    ops = pytest.importorskip("vllm._custom_ops")
    if not hasattr(torch.ops._C, "cpu_attn_reshape_and_cache"):
        pytest.skip("this vLLM was not built for the CPU")
    yield ops


def cpu_backend(ops: Any, dtype: torch.dtype, head_dim: int, isa: str, block: int) -> Case:
    """vLLM's own CPU cache update on its own cache shape."""
    cache = torch.zeros(BLOCKS, HEADS, block, 2 * head_dim, dtype=dtype)

    def update(k: torch.Tensor, v: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
        planes = cache.view(cache.shape[0], HEADS, 2 * block, -1).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(k, v, *planes, slots, isa)

    return Case(cache, update, head_dim, block)


def check_gather(case: Case, layout: PagedLayout) -> None:
    """Fill the real cache through the backend, and gather blocks in several orders."""
    ratio = case.block_size // layout.block_size
    tokens = case.num_blocks * case.block_size
    shape = (tokens, case.heads, case.head_dim)
    generator = torch.Generator().manual_seed(5)
    k, v = (torch.randn(shape, generator=generator).to(case.cache.dtype) for _ in range(2))
    slots = torch.randperm(tokens, generator=generator)
    case.update(k[slots], v[slots], case.cache, slots)
    for ids in SCATTERED:
        tensor_ids = [i * ratio + part for i in ids for part in range(ratio)]
        shape = (2, layout.heads, len(tensor_ids), layout.block_size, layout.widths[0])
        # What a GPU runs gathers from CPU tensors, too.
        for gather in (layout.gather, layout._gather_on_gpu):
            out = torch.empty(shape, dtype=case.cache.dtype)
            gather(case.cache, torch.tensor(tensor_ids), out)
            for data, got in zip((k, v), out, strict=True):
                blocks = data.view(-1, layout.block_size, layout.heads, layout.widths[0])
                assert torch.equal(got, blocks[tensor_ids].permute(2, 0, 1, 3))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("isa", ["vec", "vec16"])
def test_vllms_cpu_backend(vllm_cpu: Any, isa: str, dtype: torch.dtype, head_dim: int) -> None:
    case = cpu_backend(vllm_cpu, dtype, head_dim, isa, 64 if isa == "vec" else 16)
    layout = case.probe()
    assert layout.keys.strides is not None and layout.values.strides is not None
    check_gather(case, layout)


@pytest.mark.parametrize("make", LAYOUTS)
def test_layouts_of_hardware_that_is_not_here(make: Callable[[], Case]) -> None:
    case = make()
    check_gather(case, case.probe())


def test_probing_leaves_the_cache_alone() -> None:
    case = nhd_interleaved()
    case.cache.fill_(3.0)
    case.probe()
    assert bool((case.cache == 3.0).all())


@pytest.mark.parametrize(
    ("make", "dtype", "dims"),
    [
        (nhd_interleaved, torch.int64, 64 // 4),
        (outer_planes, torch.int64, 64 // 4),
        (lambda: nhd_interleaved(torch.float32, 80), torch.int64, 80 // 2),
        (lambda: nhd_interleaved(torch.bfloat16, 66), torch.bfloat16, 66),
    ],
    ids=["halves of a row", "far apart", "float32", "66 dims"],
)
def test_a_gpu_reads_keys_and_values_at_once(
    make: Callable[[], Case], dtype: torch.dtype, dims: int
) -> None:
    case = make()
    layout = case.probe()
    both = layout._both_planes(case.cache)
    assert both is not None
    assert both.dtype == dtype and both.shape == (2, HEADS, layout.blocks, 32, dims)


def test_a_packing_without_strides_is_gathered_by_index() -> None:
    layout = vnni_packed().probe()
    for plane in (layout.keys, layout.values):
        assert plane.strides is None
        assert plane.index is not None and plane.index.shape == (HEADS, 32, 64)


def test_a_kernel_block_that_is_a_fraction_of_the_schedulers() -> None:
    layout = kernel_blocks().probe()
    assert (layout.blocks, layout.block_size) == (4 * BLOCKS, 16)


@pytest.mark.parametrize(
    "damage",
    [
        lambda x: x.to(torch.float8_e4m3fn).to(x.dtype),  # loses digits
        lambda x: x.to(torch.bfloat16).to(x.dtype),  # keeps digits, rounds anything else
        lambda x: x * 0.5,  # scaled
        lambda x: x.abs(),  # loses the sign
        lambda x: torch.cat([x[:, :1], torch.zeros_like(x[:, 1:])], dim=1),  # drops heads
        lambda x: x[:, :1].expand_as(x).contiguous(),  # one head for all
    ],
    ids=["fp8", "rounded", "scaled", "unsigned", "dropped heads", "copied heads"],
)
@pytest.mark.parametrize("plane", [0, 1])
def test_what_is_not_stored_as_it_is_written_is_refused(
    plane: int, damage: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    case = nhd_interleaved(torch.float32)
    intact = case.update

    def update(k: torch.Tensor, v: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
        pair = [k, v]
        pair[plane] = damage(pair[plane])
        intact(pair[0], pair[1], cache, slots)

    case.update = update
    with pytest.raises(LayoutError):
        case.probe()


def test_a_cache_without_the_schedulers_blocks_is_refused() -> None:
    case = nhd_interleaved()
    case.num_blocks = 13
    with pytest.raises(LayoutError, match=r"counts 13 blocks"):
        case.probe()


def test_a_backend_without_a_cache_update_of_its_own_is_refused() -> None:
    with pytest.raises(LayoutError, match="no cache update"):
        layer_update(SimpleNamespace(impl=object()))


@pytest.mark.parametrize("make", [nhd_interleaved, vnni_packed])
def test_gathering_on_the_cpu_starts_no_threads(make: Callable[[], Case]) -> None:
    """They would slow down vLLM's own, see ``PagedLayout._gather_on_cpu``."""
    case = make()
    layout = case.probe()
    ids = torch.arange(layout.blocks)
    out = torch.empty(2, HEADS, layout.blocks, 32, 64, dtype=case.cache.dtype)

    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    def gather() -> int:
        torch.set_num_threads(4)  # this thread's, and the default of those to come
        before = threads()
        layout.gather(case.cache, ids, out)
        return threads() - before

    default = torch.get_num_threads()
    with ThreadPoolExecutor(1) as exporter:
        started = exporter.submit(gather).result()
    torch.set_num_threads(default)
    assert started == 0


def test_runs_of_consecutive_blocks() -> None:
    assert runs([]) == []
    assert runs([4, 5, 6, 2, 2, 3, 9]) == [(0, 4, 3), (3, 2, 1), (4, 2, 2), (6, 9, 1)]
