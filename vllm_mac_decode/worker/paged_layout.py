"""Where (token, head, dim) of K and of V live inside a block, learnt by writing and looking.

Layouts differ by attention backend, CPU instruction set and vLLM release. Instead of knowing
them, ``probe`` lets the backend's own cache update write index-coded values into a scratch
cache of the layer's shape and strides, reads the raw storage back, and checks what it learnt
with random data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mlx_receiver.wire.layout import KEYS, VALUES
from vllm_mac_decode.worker.numbers import Numbers
from vllm_mac_decode.worker.paged_cache import LayoutError, PagedPart

_SCRATCH_BLOCKS = 3

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

#: ``update(key, value, kv_cache, slot_mapping)``: key and value ``[tokens, heads, head_dim]``,
#: slot_mapping ``[tokens]`` int64, slot = block * block_size + offset.
CacheUpdate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True)
class PlaneMap:
    """One plane (K or V) inside a block, in elements from the block's start.

    ``strides`` are (head, token, dim) where the map is affine, else ``index`` holds every
    element's offset, ``[heads, block_size, head_dim]`` int64.
    """

    offset: int
    strides: tuple[int, int, int] | None
    index: torch.Tensor | None


@dataclass(frozen=True)
class PagedLayout:
    """See ``PagedCache``: the layout of one layer's cache tensor.

    ``block_size`` counts tokens in a block of the tensor, which may be a fraction of the
    scheduler's block. ``block_stride`` is in elements, and ``widths`` those of K and V.
    """

    blocks: int
    block_size: int
    heads: int
    widths: tuple[int, int]
    numbers: Numbers
    block_stride: int
    keys: PlaneMap
    values: PlaneMap

    @cached_property
    def parts(self) -> Sequence[PagedPart]:
        return [
            PagedPart(name, self.heads, width, self.numbers.name, scale=scale)
            for name, width, scale in zip(
                (KEYS, VALUES), self.widths, self.numbers.scales, strict=True
            )
        ]

    def read(self, cache: torch.Tensor, block_ids: torch.Tensor, out: torch.Tensor) -> None:
        cache = _plain(cache)
        self.gather(cache, block_ids, self.planes(out.view(cache.dtype), len(block_ids)))

    def planes(self, numbers: torch.Tensor, blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V ``[heads, blocks, block_size, width]``, one after the other in ``numbers``."""
        sizes = [self.heads * blocks * self.block_size * width for width in self.widths]
        keys, values = (
            plane.view(self.heads, blocks, self.block_size, width)
            for plane, width in zip(numbers.split(sizes), self.widths, strict=True)
        )
        return keys, values

    def plane(self, cache: torch.Tensor, which: PlaneMap, width: int) -> torch.Tensor:
        """An affine plane as a view ``[heads, blocks, block_size, width]`` of the cache."""
        assert which.strides is not None
        head, token, dim = which.strides
        return torch.as_strided(
            cache,
            (self.heads, self.blocks, self.block_size, width),
            (head, self.block_stride, token, dim),
            cache.storage_offset() + which.offset,
        )

    def gather(
        self, cache: torch.Tensor, block_ids: torch.Tensor, out: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        """Copy whole blocks: ``out[p][h, i, t] = plane_p[h, block_ids[i], t]``, K first.

        ``out`` are ``planes`` on the cache's device.
        """
        if cache.device.type != "cpu":
            self._gather_on_gpu(cache, block_ids, out)
            return
        for which, target in zip((self.keys, self.values), out, strict=True):
            self._gather_on_cpu(cache, which, block_ids, target)

    def _gather_on_gpu(
        self, cache: torch.Tensor, block_ids: torch.Tensor, out: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        """One kernel for K and V, of wide elements, where the layout allows it: on an H100 38 us
        for a layer of 8,192 tokens of Llama-3.1-8B's shape instead of 78."""
        both = self._both_planes(cache)
        if both is not None:
            keys = out[0]
            whole = torch.as_strided(keys, (2, *keys.shape), (keys.numel(), *keys.stride()))
            torch.index_select(both, 2, block_ids, out=whole.view(both.dtype))
            return
        for which, target in zip((self.keys, self.values), out, strict=True):
            if which.strides is not None:
                plane = self.plane(cache, which, target.shape[-1])
                torch.index_select(plane, 1, block_ids, out=target)
            else:
                assert which.index is not None
                base = cache.storage_offset() + block_ids * self.block_stride
                target.copy_(_flat(cache)[base[None, :, None, None] + which.index[:, None]])

    def _both_planes(self, cache: torch.Tensor) -> torch.Tensor | None:
        """K and V as one view ``[2, heads, blocks, block_size, width]``, in elements of 8 bytes
        (and a smaller last dimension) where everything is a multiple of that. None when their
        widths or strides differ."""
        between = self.values.offset - self.keys.offset
        width, other = self.widths
        if self.keys.strides is None or self.keys.strides != self.values.strides:
            return None
        if between < 0 or width != other:
            return None
        head, token, dim = self.keys.strides
        strides = (between, head, self.block_stride, token, dim)
        offset = cache.storage_offset() + self.keys.offset
        both = torch.as_strided(
            cache, (2, self.heads, self.blocks, self.block_size, width), strides, offset
        )
        wide = 8 // cache.element_size()
        if dim == 1 and not any(n % wide for n in (*strides[:-1], offset, width)):
            return both.view(torch.int64)
        return both

    def _gather_on_cpu(
        self, cache: torch.Tensor, which: PlaneMap, block_ids: torch.Tensor, out: torch.Tensor
    ) -> None:
        """With NumPy, which stays in this thread.

        PyTorch would start a second team of OpenMP threads. GNU's OpenMP then has more threads
        than cores, and for the process's life those that compute sleep between two loops instead
        of spinning: every decode step of vLLM's own takes a quarter longer.
        """
        target = bits(out)
        if which.strides is not None:
            source = bits(self.plane(cache, which, out.shape[-1]))
            # Blocks of one request are mostly consecutive: a few strided copies beat one indexed.
            for at, first, count in runs(block_ids.tolist()):
                np.copyto(target[:, at : at + count], source[:, first : first + count])
            return
        assert which.index is not None
        base = cache.storage_offset() + block_ids.numpy() * self.block_stride
        index = base[None, :, None, None] + which.index.numpy()[:, None]
        np.take(bits(_flat(cache)), index, out=target, mode="clip")  # "raise" would copy twice


def _plain(cache: torch.Tensor) -> torch.Tensor:
    """The same memory in a dtype that PyTorch can gather: that is not so for 8-bit floats."""
    return cache.view(torch.uint8) if cache.element_size() == 1 else cache


def _flat(cache: torch.Tensor) -> torch.Tensor:
    """The cache's whole storage."""
    return torch.as_strided(cache, (storage_elements(cache),), (1,), 0)


def bits(tensor: torch.Tensor) -> NDArray[Any]:
    """A CPU tensor's memory as integers of the same width: NumPy has no bfloat16.

    What reads a cache on a CPU goes through it: see ``PagedLayout._gather_on_cpu`` for why.
    """
    return tensor.view(_INTEGERS[tensor.element_size()]).numpy()


def runs(ids: list[int]) -> list[tuple[int, int, int]]:
    """Consecutive runs of block ids as (position, first id, count)."""
    found: list[tuple[int, int, int]] = []
    for position, block in enumerate(ids):
        if found:
            at, first, count = found[-1]
            if block == first + count:
                found[-1] = (at, first, count + 1)
                continue
        found.append((position, block, 1))
    return found


def storage_elements(tensor: torch.Tensor) -> int:
    """Elements in the tensor's whole storage."""
    return tensor.untyped_storage().nbytes() // tensor.element_size()


def probe(
    cache: torch.Tensor,
    num_blocks: int,
    block_size: int,
    heads: int,
    widths: tuple[int, int],
    update: CacheUpdate,
    numbers: Numbers,
) -> PagedLayout:
    """Learn the layout of ``cache``, a layer's paged KV of ``num_blocks`` scheduler blocks.

    ``block_size`` is the scheduler's, ``widths`` those of a head's K and V. Raises LayoutError when
    the cache has no block dimension, or does not give back what was written.
    """
    block_dim, ratio = _block_dim(cache, num_blocks)
    if block_size % ratio:
        raise LayoutError(f"{ratio} tensor blocks do not divide a block of {block_size} tokens")
    tokens = block_size // ratio
    scratch = _scratch(cache, block_dim)

    codes = _write_codes(scratch, tokens, heads, widths, update, numbers)
    start = scratch.stride(block_dim)  # block 1 is the one that was written
    maps = []
    first = 0
    for width in widths:
        count = tokens * heads * width
        where = _positions(codes, first, count)
        relative = (where - start).view(tokens, heads, width).permute(1, 0, 2)
        maps.append(_plane_map(relative, cache.device))
        first += count
    layout = PagedLayout(
        blocks=cache.shape[block_dim],
        block_size=tokens,
        heads=heads,
        widths=widths,
        numbers=numbers,
        block_stride=cache.stride(block_dim),
        keys=_rebase(maps[0], scratch, cache, block_dim),
        values=_rebase(maps[1], scratch, cache, block_dim),
    )
    _verify(scratch, layout, maps, update)
    return layout


def _block_dim(cache: torch.Tensor, num_blocks: int) -> tuple[int, int]:
    """The dimension that counts blocks, and tensor blocks per scheduler block."""
    for dim in range(cache.dim()):
        if cache.shape[dim] >= num_blocks and cache.shape[dim] % num_blocks == 0:
            return dim, cache.shape[dim] // num_blocks
    raise LayoutError(f"no dimension of its shape {tuple(cache.shape)} counts {num_blocks} blocks")


def _scratch(cache: torch.Tensor, block_dim: int) -> torch.Tensor:
    """A small cache with the same strides inside a block."""
    shape, strides = list(cache.shape), list(cache.stride())
    shrink = cache.shape[block_dim]
    shape[block_dim] = _SCRATCH_BLOCKS
    for dim, stride in enumerate(strides):
        if stride > strides[block_dim]:  # an outer dimension, such as [2, blocks, ...]
            strides[dim] = stride // shrink * _SCRATCH_BLOCKS
    return torch.empty_strided(shape, strides, dtype=cache.dtype, device=cache.device)


def _write_codes(
    scratch: torch.Tensor,
    tokens: int,
    heads: int,
    widths: tuple[int, int],
    update: CacheUpdate,
    numbers: Numbers,
) -> torch.Tensor:
    """Write every element's index into block 1, digit by digit; what each storage element holds
    (-1: nothing)."""
    counts = [tokens * heads * width for width in widths]
    indexes = torch.arange(sum(counts), device=scratch.device)
    base = numbers.integers
    slots = torch.arange(tokens, 2 * tokens, device=scratch.device, dtype=torch.int64)
    held = torch.zeros(storage_elements(scratch), dtype=torch.int64, device=scratch.device)
    seen = torch.ones_like(held, dtype=torch.bool)
    raw = torch.as_strided(scratch, (held.numel(),), (1,), 0)
    weight, rest = 1, sum(counts) - 1
    while True:
        digits = (indexes // weight % base + 1).split(counts)
        keys, values = (
            numbers.to_write(digits[part].view(tokens, heads, width), part)
            for part, width in enumerate(widths)
        )
        raw.zero_()
        update(keys, values, scratch, slots)
        found = raw.view(numbers.stored).to(torch.float64)
        seen &= (found >= 1) & (found <= base) & (found == found.round())
        held += torch.where(seen, found.to(torch.int64) - 1, 0) * weight
        weight, rest = weight * base, rest // base
        if rest == 0:
            break
    return torch.where(seen, held, -1)


def _positions(codes: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """Storage offsets of the elements numbered first .. first + count - 1."""
    at = torch.nonzero((codes >= first) & (codes < first + count)).flatten()
    if at.numel() != count:
        raise LayoutError(
            f"{at.numel()} of {count} elements could be found again: "
            "the backend stores them in another form"
        )
    where = torch.full((count,), -1, dtype=torch.int64, device=codes.device)
    where[codes[at] - first] = at
    if bool((where < 0).any()):
        raise LayoutError("some elements are stored twice and others not at all")
    return where


def _plane_map(relative: torch.Tensor, device: torch.device) -> PlaneMap:
    """Strides if the offsets ``[heads, tokens, dim]`` are affine, else the offsets."""
    offset = int(relative[0, 0, 0])
    steps = [
        int(relative.select(axis, 1).flatten()[0]) - offset if relative.shape[axis] > 1 else 0
        for axis in range(3)
    ]
    grids = torch.meshgrid(
        *(torch.arange(n, device=relative.device) for n in relative.shape), indexing="ij"
    )
    affine = offset + sum(grid * step for grid, step in zip(grids, steps, strict=True))
    if torch.equal(affine, relative):
        return PlaneMap(offset, (steps[0], steps[1], steps[2]), None)
    return PlaneMap(0, None, relative.contiguous().to(device))


def _rebase(
    plane: PlaneMap, scratch: torch.Tensor, cache: torch.Tensor, block_dim: int
) -> PlaneMap:
    """The map of the real cache: offsets into an outer dimension grow with its stride."""
    outer = [d for d in range(cache.dim()) if cache.stride(d) > cache.stride(block_dim)]
    if not outer:
        return plane
    if plane.strides is None or len(outer) != 1:
        raise LayoutError(
            f"cannot read strides {cache.stride()} with blocks in dimension {block_dim}"
        )
    step = scratch.stride(outer[0])
    return PlaneMap(
        plane.offset // step * cache.stride(outer[0]) + plane.offset % step, plane.strides, None
    )


def _verify(
    scratch: torch.Tensor, layout: PagedLayout, maps: list[PlaneMap], update: CacheUpdate
) -> None:
    """Write random K and V into all scratch blocks, in a mixed order, and read them back."""
    numbers = layout.numbers
    tokens = _SCRATCH_BLOCKS * layout.block_size
    local = replace(layout, blocks=_SCRATCH_BLOCKS, keys=maps[0], values=maps[1])
    slots = torch.randperm(tokens, device=scratch.device)
    held = [
        _random((tokens, layout.heads, width), numbers, scratch.device) for width in layout.widths
    ]
    keys, values = (numbers.to_write(data, part) for part, data in enumerate(held))
    update(keys, values, scratch, slots)
    ids = torch.arange(_SCRATCH_BLOCKS, device=scratch.device)
    raw = _plain(scratch)
    count = tokens * layout.heads * sum(layout.widths)
    out = local.planes(torch.empty(count, dtype=raw.dtype, device=raw.device), _SCRATCH_BLOCKS)
    local.gather(raw, ids, out)
    for data, got, name in zip(held, out, ("K", "V"), strict=True):
        expected = torch.empty_like(data)
        expected[slots] = data
        read = got.view(numbers.stored).to(data.dtype)
        if not torch.equal(read.flatten(1, 2).transpose(0, 1), expected):
            raise LayoutError(f"{name} does not read back as it was written")


def _random(shape: tuple[int, ...], numbers: Numbers, device: torch.device) -> torch.Tensor:
    """Of what the cache holds exactly: of 8-bit floats small integers, which no rounding moves."""
    if numbers.stored.itemsize > 1:
        return torch.randn(shape, device=device).to(numbers.stored)
    signs = torch.randint(0, 2, shape, device=device) * 2 - 1
    return torch.randint(1, numbers.integers + 1, shape, device=device).float() * signs


def latent_update(layer: Any) -> CacheUpdate:
    """The same of a layer with a latent cache (MLA): the latent is its K, the rotated key its V."""
    update = _own_update(layer)

    def call(
        key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor
    ) -> None:
        scale = getattr(layer, "_k_scale", None)
        update(key.squeeze(1), value, cache, slots, layer.kv_cache_dtype, scale)

    return call


def layer_update(layer: Any) -> CacheUpdate:
    """The attention layer's own cache update. Raises LayoutError when it has none of its own."""
    update = _own_update(layer)

    def call(
        key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor
    ) -> None:
        update(layer, key, value, cache, slots)

    return call


def _own_update(layer: Any) -> Callable[..., None]:
    impl = getattr(layer, "impl", None)
    update: Callable[..., None] | None = getattr(impl, "do_kv_cache_update", None)
    if update is None:
        raise LayoutError(f"{type(impl).__name__} has no cache update of its own to probe with")
    return update
