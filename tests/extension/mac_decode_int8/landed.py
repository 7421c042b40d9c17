"""The receiver's side: where the kind's blocks land, and the cache that is made of them."""

import mlx.core as mx
import numpy as np

from mac_decode_int8 import KIND
from mlx_receiver.caches.adapter import CARRIERS, Rows, mlx_dtype
from mlx_receiver.caches.joinable import JoinableKVCache
from mlx_receiver.caches.plain import PlainKV, capacity
from mlx_receiver.wire.layout import ITEMSIZE, LayerLayout, Part


class Int8KV(PlainKV):
    """As the built-in adapter of mlx-lm's ``KVCache``, except for how its numbers travel."""

    kind = KIND

    def layout(self, cache):
        plain = super().layout(cache)
        if plain is None:
            return None
        # Of the cache that is decoded from: dtypes on the way are vLLM's side's to say.
        scales = [Part(f"{p.name}.scale", p.heads, 1, p.dtype) for p in plain.parts]
        return LayerLayout(KIND, scales + plain.parts)

    def allocate(self, layer, tokens, headroom):
        return Int8Buffers(layer, tokens, capacity(tokens, headroom))

    def parts(self, layer, cache, tokens):
        planes = [rounded(plane) for plane in super().parts(layer, cache, tokens)]
        return [scale for scale, _ in planes] + [numbers for _, numbers in planes]


class Int8Buffers:
    """One layer's memory ``[heads, capacity, width]``, written through NumPy's aliases."""

    def __init__(self, layer, tokens, capacity):
        self._tokens = tokens
        self._dtypes = [mlx_dtype(part.dtype) for part in layer.parts]
        self._arrays = [
            mx.zeros((part.heads, capacity, part.width), CARRIERS[ITEMSIZE[part.dtype]])
            for part in layer.parts
        ]
        mx.eval(self._arrays)
        self._aliases = [np.array(array, copy=False) for array in self._arrays]

    def part(self, index):
        return self._aliases[index]

    def rows(self, index, heads, tokens):
        return Rows([row.data.cast("B") for row in self._aliases[index][heads, tokens]])

    def build(self, dtypes):
        self._aliases = []
        arrays = [
            array.view(dtype) for array, dtype in zip(self._arrays, self._dtypes, strict=True)
        ]
        self._arrays = []
        keys, values = (
            (arrays[i].astype(mx.float32) * arrays[i + 2]).astype(dtypes[i + 2])[None]
            for i in range(2)
        )
        mx.eval(keys, values)  # before the next layer's, so that little is there twice
        return JoinableKVCache.holding(keys, values, self._tokens), [keys, values]


def rounded(plane):
    """A part's scales and its numbers, as vLLM's side sends them."""
    numbers = plane.astype(mx.float32)
    scale = (mx.abs(numbers).max(axis=-1, keepdims=True) / 127).astype(mx.bfloat16)
    return scale, mx.round(numbers / mx.maximum(scale.astype(mx.float32), 1e-30)).astype(mx.int8)
