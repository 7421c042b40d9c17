"""How fast KV becomes what travels in a codec, and raw KV again: what both sides say of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from mlx_receiver.planning.cost import Codec
from mlx_receiver.wire.profile import Coding
from mlx_receiver.wire.quantised import BITS

#: Bytes of raw KV a second that a side is taken to do where it does not say: what one core of a
#: server does (``bench/results/codecs.json``, the slower of encoding and decoding).
ASSUMED: Final = {"q8": 0.65e9, "q4": 0.65e9}


def codec(name: str, ratio: float, vllm: Coding, mac: Coding, streams: int = 1) -> Codec:
    """How KV travels in the codec of that name, which makes it so much smaller, over ``streams``
    connections of each of vLLM's workers: each worker quantises in one thread, each connection's
    thread at the receiver decodes."""
    if name not in ASSUMED:
        return Codec(name, ratio)
    helping = min(mac.threads, max(1, streams) * vllm.threads)
    encode, decode = vllm.rate(name) * vllm.threads, mac.rate(name) * helping
    return Codec(name, ratio, encode or ASSUMED[name], decode or ASSUMED[name])


def of_workers(told: Sequence[tuple[int, Mapping[str, float]]]) -> Coding:
    """vLLM's side, by what its workers say: each the bytes that it sends for a token, and how fast
    it quantises in each codec. A prompt's KV is quantised when the last of them has done its part.
    """
    parts = [(nbytes, rates) for nbytes, rates in told if nbytes > 0]
    whole = sum(nbytes for nbytes, _ in parts)
    found = {
        name: min((rates.get(name, 0.0) * whole / nbytes for nbytes, rates in parts), default=0.0)
        for name in BITS
    }
    threads = max(1, len(parts))
    return Coding(found["q8"] / threads, found["q4"] / threads, threads)
