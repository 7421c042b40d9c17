"""Quantised blocks back into the numbers that a cache holds: what ``mx.dequantize`` makes of them.

It is NumPy's work here and not MLX's, bit by bit the same: the threads that land blocks may not
take the device from the one that decodes, and on a CPU this is no slower (``bench/codecs.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mlx_receiver.wire.frames import Header
from mlx_receiver.wire.layout import ITEMSIZE
from mlx_receiver.wire.quantised import BITS, GROUP

#: Groups that are decoded at a time: their numbers stay in a processor's cache.
_AT_ONCE: Final = 4096

#: Below it no float16 is infinite.
_LARGEST_HALF: Final = 65504.0

_Words = NDArray[np.uint32]
_Reals = NDArray[np.float32]


def scratch_bytes(header: Header) -> int:
    """Bytes that ``decoded`` needs beside the payload."""
    numbers = header.heads * header.tokens * header.width
    return 16 * min(numbers, _AT_ONCE * GROUP)


def decoded(header: Header, payload: memoryview) -> Iterator[memoryview]:
    """A quantised block's numbers as bytes, in order and a piece at a time: the next one is written
    into the same memory."""
    groups = header.heads * header.tokens * (header.width // GROUP)
    bits, size = BITS[header.codec], ITEMSIZE[header.dtype]
    integers = np.uint16 if size == 2 else np.uint32
    packed_bytes = groups * GROUP * bits // 8
    packed = np.frombuffer(payload, np.uint8, packed_bytes).reshape(groups, -1)
    scales = np.frombuffer(payload, integers, groups, packed_bytes)
    biases = np.frombuffer(payload, integers, groups, packed_bytes + groups * size)
    reals: _Reals = np.empty((min(groups, _AT_ONCE), GROUP), np.float32)
    words: _Words = np.empty(reals.shape, np.uint32)
    out = np.empty(reals.shape, integers)
    # Numbers beyond the dtype's range become infinite, as they do in MLX.
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, groups, _AT_ONCE):
            some = slice(start, start + _AT_ONCE)
            piece = _unpacked(packed[some], bits)
            count = len(piece)
            reals[:count] = piece
            _scale(
                header.dtype, reals[:count], words[:count], scales[some], biases[some], out[:count]
            )
            yield out[:count].data.cast("B")


def _unpacked(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """One number a byte; the first of two is in the lower half."""
    if bits == 8:
        return packed
    pairs = packed.astype(np.uint16)
    pairs |= pairs << 4
    pairs &= 0x0F0F
    return pairs.astype("<u2", copy=False).view(np.uint8)


def _scale(
    dtype: str,
    reals: _Reals,
    words: _Words,
    scales: NDArray[Any],
    biases: NDArray[Any],
    out: NDArray[Any],
) -> None:
    """``out`` becomes ``reals * scales + biases``, rounded to the dtype after each step; ``words``
    is for what comes in between."""
    match dtype:
        case "float32":
            reals *= scales.view(np.float32)[:, None]
            np.add(reals, biases.view(np.float32)[:, None], out=out.view(np.float32))
        case "float16":
            by, plus = (e.view(np.float16).astype(np.float32)[:, None] for e in (scales, biases))
            if np.abs(by * 255).max() + np.abs(plus).max() < _LARGEST_HALF:
                _scale_halves(reals, words, by, plus, out)
                return
            reals *= by
            reals[:] = reals.astype(np.float16)
            reals += plus
            out.view(np.float16)[:] = reals
        case "bfloat16":
            bits: _Words = reals.view(np.uint32)
            reals *= _widened(scales)
            _round(bits, words, 16)
            bits &= 0xFFFF0000
            reals += _widened(biases)
            _round(bits, words, 16)
            np.right_shift(bits, 16, out=out, casting="unsafe")


def _scale_halves(
    reals: _Reals, words: _Words, scales: _Reals, biases: _Reals, out: NDArray[Any]
) -> None:
    """``_scale`` to float16 where nothing becomes infinite, several times as fast as NumPy's casts.

    A float32 is rounded to float16's 11 digits. What has fewer in float16, being below 2**-14, is a
    multiple of 2**-24 already, like all sums and whole multiples of such numbers.
    """
    bits: _Words = reals.view(np.uint32)
    reals *= scales
    _round(bits, words, 13)
    bits &= 0xFFFFE000
    reals += biases
    # The exponents now count from where float16's do.
    reals *= np.float32(2.0**-112)
    _round(bits, words, 13)
    np.right_shift(bits, 16, out=words)
    words &= 0x8000
    bits >>= 13
    bits &= 0x7FFF
    np.bitwise_or(bits, words, out=out, casting="unsafe")


def _widened(numbers: NDArray[Any]) -> _Reals:
    """bfloat16 as float32, one a row: the upper half of it."""
    found: _Reals = (numbers.astype(np.uint32) << 16).view(np.float32)[:, None]
    return found


def _round(bits: _Words, scratch: _Words, lost: int) -> None:
    """float32 numbers to the nearest without the ``lost`` last bits, whose value is then void; of
    two as near to the even one."""
    np.right_shift(bits, lost, out=scratch)
    scratch &= 1
    scratch += (1 << lost - 1) - 1
    bits += scratch
