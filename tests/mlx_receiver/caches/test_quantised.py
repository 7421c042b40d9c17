"""What arrives quantised becomes the numbers that MLX makes of it, bit by bit."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_receiver.caches.quantised import decoded
from mlx_receiver.wire.frames import Header, Kind
from mlx_receiver.wire.quantised import GROUP, row_bytes
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


def arrived(array: mx.array, codec: str, dtype: str) -> np.ndarray:
    """The carriers that a block of ``[heads, tokens, width]`` becomes."""
    data = payload(array, codec)
    heads, tokens, width = array.shape
    assert len(data) == heads * tokens * row_bytes(codec, dtype, width)
    header = Header(
        Kind.BLOCK, 1, len(data), dtype=dtype, heads=heads, tokens=tokens, width=width, codec=codec
    )
    pieces = [bytes(piece) for piece in decoded(header, memoryview(data))]
    return np.frombuffer(b"".join(pieces), integers(array[:1, :1]).dtype).reshape(array.shape)


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("codec", ["q8", "q4"])
def test_every_number_is_mlx_s(codec: str, dtype: str) -> None:
    for name, numbers in rows(dtype):
        array = as_mlx(numbers[None], dtype)
        wanted = integers(there_and_back(array, codec))
        assert same(arrived(array, codec, dtype), wanted, dtype), name


@pytest.mark.parametrize("codec", ["q8", "q4"])
@pytest.mark.parametrize("shape", [(1, 1, 64), (3, 5, 128), (2, 2049, 192)])
def test_shapes_and_pieces(codec: str, shape: tuple[int, int, int]) -> None:
    """The last one is decoded in several pieces, the last of them shorter."""
    numbers = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    array = as_mlx(numbers, "bfloat16")
    wanted = integers(there_and_back(array, codec))
    assert np.array_equal(arrived(array, codec, "bfloat16"), wanted)


@pytest.mark.parametrize("small", [False, True], ids=["any", "small"])
@pytest.mark.parametrize("dtype", LARGEST)
def test_any_scales_that_a_peer_may_send(dtype: str, small: bool) -> None:
    """No bits of scales and biases are an error, and all are decoded as MLX decodes them; also
    those below 2, where no number becomes infinite and many of float16's are denormal."""
    source, count = np.random.default_rng(3), 20_000
    kind = np.dtype(np.uint32 if dtype == "float32" else np.uint16)
    packed = source.integers(0, 256, (count, GROUP), dtype=np.uint8)
    ends = source.integers(0, 2 ** (8 * kind.itemsize), (2, count), dtype=kind)
    if small:
        ends &= ~kind.type(1 << 8 * kind.itemsize - 2)  # the exponent's first bit
        ends[:, ::3] &= ~kind.type(0x7C00 if dtype == "float16" else 0)
    data = b"".join(part.tobytes() for part in (packed, *ends))
    header = Header(
        Kind.BLOCK, 1, len(data), dtype=dtype, heads=1, tokens=count, width=GROUP, codec="q8"
    )
    got = np.frombuffer(b"".join(map(bytes, decoded(header, memoryview(data)))), kind)
    scales, biases = (from_integers(part[:, None], dtype) for part in ends)
    numbers = mx.array(packed.view(np.uint32))
    wanted = mx.dequantize(numbers, scales, biases, group_size=GROUP, bits=8)
    assert same(got.reshape(count, GROUP), integers(wanted), dtype)
