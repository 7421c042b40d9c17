"""Numbers that are hard to quantise, and what MLX makes of them: the reference for both sides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_receiver.caches.adapter import CARRIERS, mlx_dtype
from mlx_receiver.wire.quantised import BITS, GROUP

#: The largest number of each dtype.
LARGEST = {"bfloat16": 3.3895e38, "float16": 65504.0, "float32": 3.4028e38}


def as_mlx(numbers: NDArray[Any], dtype: str) -> mx.array:
    """float32 numbers in that dtype."""
    return mx.array(numbers).astype(mlx_dtype(dtype))


def integers(array: mx.array) -> NDArray[Any]:
    """The bits of its numbers."""
    return np.array(array.view(CARRIERS[array.dtype.size]))


def from_integers(carriers: NDArray[Any], dtype: str) -> mx.array:
    """An array of those bits."""
    return mx.array(carriers).view(mlx_dtype(dtype))


def payload(array: mx.array, codec: str) -> bytes:
    """What travels of ``[heads, tokens, width]``, made by MLX alone."""
    packed, scales, biases = mx.quantize(array, group_size=GROUP, bits=BITS[codec])
    return b"".join(integers(part).tobytes() for part in (packed, scales, biases))


def there_and_back(array: mx.array, codec: str) -> mx.array:
    """What MLX itself decodes from such a cache."""
    parts = mx.quantize(array, group_size=GROUP, bits=BITS[codec])
    return mx.dequantize(*parts, group_size=GROUP, bits=BITS[codec])


def same(a: NDArray[Any], b: NDArray[Any], dtype: str) -> bool:
    """Whether two arrays of carriers are the same numbers bit by bit; one NaN is like another."""
    nan = [np.array(mx.isnan(from_integers(bits, dtype))) for bits in (a, b)]
    return bool(((a == b) | (nan[0] & nan[1])).all())


def rows(dtype: str) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Names and groups of 64 float32 numbers each, which the dtype may round."""
    source = np.random.default_rng(1)
    normal = source.standard_normal((500, GROUP)).astype(np.float32)
    largest = np.float32(LARGEST[dtype])
    outlier, infinite = normal.copy(), normal.copy()
    outlier[:, 3], infinite[:, 5] = largest, -np.inf
    bits = source.integers(0, 2**32, normal.shape, dtype=np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        yield "normal", normal
        yield "of every size", normal * np.float32(10) ** source.integers(-40, 38, (500, 1))
        yield "constant", np.repeat(normal[:, :1], GROUP, axis=1)
        yield "zero", np.zeros((4, GROUP), np.float32)
        yield "minus zero", -np.zeros((4, GROUP), np.float32)
        yield "too small for a step", normal * np.float32(1e-9)
        yield "denormal", normal * np.float32(1e-39)
        yield "half's denormals", normal * np.float32(1e-6)
        yield "one in a group", np.eye(GROUP, dtype=np.float32) * normal[:GROUP]
        yield "far from zero", 1000 + normal
        yield "far below zero", -1000 + normal
        yield "two values", np.where(normal > 0, np.float32(1), np.float32(-1))
        yield "halves", np.tile(np.arange(GROUP, dtype=np.float32) / 2, (4, 1))
        yield "largest", np.where(normal > 0, largest, -largest)
        yield "largest alone", np.full((4, GROUP), largest)
        yield "an outlier", outlier
        yield "integers", source.integers(-128, 128, (500, GROUP)).astype(np.float32)
        yield "any bits", np.where(np.isfinite(bits), bits, np.float32(0))
        yield "infinite", infinite
