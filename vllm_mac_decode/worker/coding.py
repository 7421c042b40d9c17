"""How fast a worker quantises what it sends: measured once, when its caches have been allocated and
nothing is computed yet.

It is what the exporter does with a piece of a layer: read blocks out of the paged cache, quantise
them where they are, and have the bytes in the host's memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final

import torch
from vllm.logger import init_logger

from mlx_receiver.wire.quantised import BITS, RAW, codec_of
from vllm_mac_decode.worker.paged_cache import ExportedLayer
from vllm_mac_decode.worker.quantise import Quantised, Scratch
from vllm_mac_decode.worker.staging import SLOT_BYTES, StagingRing

logger = init_logger("vllm.mac_decode.exporter")

#: Rounds for each codec, of which the fastest counts, and seconds of each, in which one piece is
#: done at least; seconds after which no other round begins.
_ROUNDS: Final = 3
_SECONDS: Final = 0.012
_MOST_SECONDS: Final = 0.08


def token_bytes(layers: Collection[ExportedLayer]) -> int:
    """Bytes of raw KV that all of them send for a token."""
    parts = [part for layer in layers if layer.by_token for part in layer.layout.parts]
    return sum(part.heads * part.row_bytes for part in parts)


def measured(layers: Collection[ExportedLayer], blocks: int) -> dict[str, float]:
    """Bytes of raw KV a second, by codec, where the caches have that many of the scheduler's
    blocks; empty where nothing of them can be quantised, or it fails."""
    try:
        layer = next((layer for layer in layers if _quantisable(layer)), None)
        if layer is None or blocks < 1:
            return {}
        # A thread of its own, as the exporter has: PyTorch's threads and memory pools depend on it.
        with ThreadPoolExecutor(1, "mac-decode-coding") as thread:
            return thread.submit(_rates, layer, blocks).result()
    except Exception as error:
        # Nothing depends on it: plans take what a usual core does.
        logger.info("how fast KV is quantised could not be measured: %s", error)
        return {}


def _rates(layer: ExportedLayer, blocks: int) -> dict[str, float]:
    if layer.device.type == "cuda":
        # A thread starts on device 0, where pinning memory would make a context.
        torch.cuda.set_device(layer.device)
    ring = StagingRing(2 * SLOT_BYTES, layer.device)
    return {codec: _rate(layer, codec, blocks * layer.split, ring) for codec in BITS}


def _quantisable(layer: ExportedLayer) -> bool:
    parts = layer.layout.parts
    return layer.by_token and any(codec_of(part, codec) != RAW for codec in BITS for part in parts)


def _rate(layer: ExportedLayer, codec: str, blocks: int, ring: StagingRing) -> float:
    size, parts = layer.layout.block_size, layer.layout.parts
    block = size * sum(part.heads * part.row_bytes for part in parts)
    count = min(blocks, max(1, SLOT_BYTES // block))
    ids, scratch = torch.arange(count, device=layer.device), Scratch()
    content = Quantised(parts, codec, count * size, 0, count * size)
    # On a GPU one piece is quantised while another one is copied.
    slots = [ring.acquire(content.nbytes) for _ in range(1 if ring.stream is None else 2)]
    written = _event(layer.device)
    fill = partial(content.fill, partial(layer.read, ids), scratch)

    def piece(number: int) -> None:
        slot = slots[number % len(slots)]
        slot.wait()
        slot.fill(content.nbytes, fill, written)

    def finish() -> None:
        for slot in slots:
            slot.wait()

    try:
        for number in range(len(slots)):  # the first ones make what the others use again
            piece(number)
        finish()
        until, rates = time.perf_counter() + _MOST_SECONDS, [_pieces(piece, finish)]
        while len(rates) < _ROUNDS and time.perf_counter() < until:
            rates.append(_pieces(piece, finish))
        return max(rates) * count * block
    finally:
        for slot in slots:
            ring.release(slot)


def _pieces(piece: Callable[[int], None], finish: Callable[[], None]) -> float:
    """How many of them are done in a second."""
    done, began = 0, time.perf_counter()
    while not done or time.perf_counter() - began < _SECONDS:
        piece(done)
        done += 1
    finish()
    return done / (time.perf_counter() - began)


def _event(device: torch.device) -> torch.cuda.Event | None:
    """After which the cache may be read."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record()
    return event
