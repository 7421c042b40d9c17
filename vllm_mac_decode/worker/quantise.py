"""Rows of a cache, quantised as MLX quantises them (``wire.quantised``), where the cache is.

Every step is the one that MLX takes on a CPU, in the same float32 arithmetic, so the bytes are
those of ``mx.quantize`` there. All of a group with a NaN in it is NaN here, while MLX quantises the
others as if it were not there. What MLX does on a Mac's GPU differs in two things: zero is in every
group's range, and halves are rounded away from zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch

from mlx_receiver.wire.quantised import BITS, GROUP, RAW, codec_of, row_bytes
from vllm_mac_decode.worker.paged_cache import PagedPart

#: Groups that a CPU does at a time: they stay in its cache.
_AT_ONCE: Final = 4096

#: Smaller steps than this are none, as in MLX.
_LEAST: Final = 1e-7


#: Each part of a staging buffer begins at a multiple of so many bytes.
_ALIGNED: Final = 64


class Scratch:
    """Memory that whole blocks are read into before they are quantised. For one thread; on a GPU
    also for one stream, in whose order it is used again."""

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None

    def take(self, nbytes: int, device: torch.device) -> torch.Tensor:
        """So many bytes of it, until they are taken again."""
        if self._memory is None or len(self._memory) < nbytes:
            self._memory = None  # before there is more of it
            self._memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        return self._memory[:nbytes]


class Quantised:
    """What is sent of a piece of a layer that has rows for tokens: of each part the rows ``low`` to
    ``high`` of the ``rows`` that are read, quantised where that is possible.

    ``places``: each part, its codec, and from where to where its bytes are. ``nbytes`` of all.
    """

    def __init__(
        self, parts: Sequence[PagedPart], codec: str, rows: int, low: int, high: int
    ) -> None:
        self._rows, self._low, self._high = rows, low, high
        self.places: list[tuple[PagedPart, str, int, int]] = []
        end = 0
        for part in parts:
            own = codec_of(part, codec)
            begin = -(-end // _ALIGNED) * _ALIGNED
            end = begin + part.heads * (high - low) * row_bytes(own, part.dtype, part.width)
            self.places.append((part, own, begin, end))
        self.nbytes = end

    def fill(
        self, read: Callable[[torch.Tensor], None], scratch: Scratch, out: torch.Tensor
    ) -> None:
        """Have ``read`` write all rows of all parts, and write what is sent into ``out``."""
        sizes = [part.nbytes(self._rows) for part, *_ in self.places]
        whole = scratch.take(sum(sizes), out.device)
        read(whole)
        for (part, codec, begin, end), raw in zip(self.places, whole.split(sizes), strict=True):
            rows = raw.view(part.heads, self._rows, -1)[:, self._low : self._high]
            if codec == RAW:
                out[begin:end].view(rows.shape).copy_(rows)
            else:
                quantise(rows.view(getattr(torch, part.dtype)), codec, out[begin:end])


def quantise(rows: torch.Tensor, codec: str, out: torch.Tensor) -> None:
    """Write the rows ``[heads, tokens, width]`` to ``out``, uint8 ``[bytes]`` on their device and
    as long as ``wire.quantised.row_bytes`` says. On a GPU this only queues."""
    groups = rows.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    groups = groups.view(-1, GROUP)
    bits, count, size = BITS[codec], len(groups), rows.dtype.itemsize
    ends = [count * GROUP * bits // 8]
    ends += [ends[0] + count * size, ends[0] + 2 * count * size]
    packed = out[: ends[0]].view(count, -1)
    scales = out[ends[0] : ends[1]].view(rows.dtype)
    biases = out[ends[1] : ends[2]].view(rows.dtype)
    step = _AT_ONCE if rows.device.type == "cpu" else count
    for start in range(0, count, step):
        some = slice(start, start + step)
        _quantise(groups[some], bits, packed[some], scales[some], biases[some])


def _quantise(
    groups: torch.Tensor,
    bits: int,
    packed: torch.Tensor,
    scales: torch.Tensor,
    biases: torch.Tensor,
) -> None:
    """``groups`` are used up."""
    low, high = groups.amin(dim=1), groups.amax(dim=1)
    most = 2**bits - 1
    negative = low.abs() > high.abs()
    # By a tensor: on a GPU, PyTorch would multiply with a number's reciprocal, which rounds twice.
    step = ((high - low) / torch.full_like(low, most)).clamp_min_(_LEAST)
    step = torch.where(negative, step, -step)
    # The end that is farther from zero is kept exactly, and so is zero, as near as the other end
    # allows.
    edge = torch.where(negative, low, high)
    steps = (edge / step).round_()
    none = steps == 0
    step = torch.where(none, step, edge / steps)
    bias = edge.masked_fill(none, 0.0)
    numbers = groups.sub_(bias[:, None]).div_(step[:, None]).round_().clamp_(0, most)
    numbers = numbers.nan_to_num_(0.0).to(torch.uint8)
    if bits == 4:
        # The first of two numbers goes into the lower half of a byte.
        pairs = numbers.view(torch.int16)
        numbers = (pairs | pairs >> 4).to(torch.uint8)
    packed.copy_(numbers)
    scales.copy_(step)
    biases.copy_(bias)
