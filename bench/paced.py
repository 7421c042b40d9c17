"""What the paced benches share: computations are waits, and everything between them is real.

The reference is the published hand-off of Llama-3.1-8B in fp16 (8,192 tokens in, 32 out, 10 GbE):
it prefills for 1.47 s on a DGX Spark and decodes for 0.85 s on a Mac Studio. Layer i of a step is
there when the step has lasted (i + 1) / layers of its time; vLLM's export hook comes earlier still
(before the layer's attention), so this is the pessimistic side. Other lengths take the time that
their arithmetic takes at the published rates.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from bench.agent_trace import longest_common
from bench.lab import tell
from bench.transport import HEAD_DIM, HEADS, ITEM, Receiving, told
from mlx_receiver.wire.messages import DataTicket, Endpoint

LAYERS = 32
BLOCK = 16
OUTPUT_TOKENS = 32

#: Seconds of the published reference, alone and together.
PUBLISHED = {
    "spark_prefill": 1.47,
    "spark_decode": 2.87,
    "mac_prefill": 5.57,
    "mac_decode": 0.85,
    "together": 2.32,
}
PUBLISHED_TOKENS = 8192

#: Tokens that vLLM computes in one step.
STEP_TOKENS = 8192

_WEIGHTS = 8.03e9
_WIDTH = 4096  # attention heads x head_dim


def _operations(start: int, end: int) -> float:
    """Floating-point operations of prefilling tokens ``start`` to ``end``."""
    pairs = (end * end - start * start) / 2
    return 2 * _WEIGHTS * (end - start) + 4 * _WIDTH * LAYERS * pairs


def prefill_seconds(start: int, end: int) -> float:
    """Seconds that the published prefill rate needs for a prompt's tokens ``start`` to ``end``."""
    whole = _operations(0, PUBLISHED_TOKENS)
    return PUBLISHED["spark_prefill"] * _operations(start, end) / whole


def kv_bytes(tokens: int) -> int:
    """What is to be transferred for a prompt."""
    return 2 * LAYERS * HEADS * tokens * HEAD_DIM * ITEM


def decode_seconds(tokens: int) -> float:
    """Seconds of OUTPUT_TOKENS at the published memory rate: each reads weights and cache once."""
    read = 2 * _WEIGHTS + kv_bytes(tokens)
    return PUBLISHED["mac_decode"] * read / (2 * _WEIGHTS + kv_bytes(PUBLISHED_TOKENS))


def sleep_until(moment: float) -> None:
    """Wait for a moment of the monotonic clock."""
    left = moment - time.monotonic()
    if left > 0:
        time.sleep(left)


class Lines:
    """JSON lines over a socket: what the control channel says, over the same link."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._file = sock.makefile("r")

    def say(self, **message: Any) -> None:
        self._sock.sendall((json.dumps(message) + "\n").encode())

    def hear(self) -> Any:
        return json.loads(self._file.readline())


# --- the Mac's process ----------------------------------------------------------------------


def meet_sender(side: Receiving, host: str) -> Lines:
    """Tell where the receiver is, and wait for the sender."""
    server = socket.create_server((host, 0))
    tell(**told(side), control=server.getsockname()[1])
    return Lines(server.accept()[0])


def one_layer() -> None:
    """Let all layers of a session have one layer's memory; each is made, and then dropped."""
    import copy

    from mlx_receiver.caches import model

    class OneLayer(model.CacheBuffers):
        def grow(self) -> bool:
            grew = super().grow()
            if grew and len(self._made) > 1:
                again: Any = copy.copy(self._made[0])
                again._arrays = list(again._arrays)
                self._made[-1] = again
            return grew

    model.CacheBuffers = OneLayer  # type: ignore[misc]


def rows(tokens: Sequence[int], start: int, plane: int) -> np.ndarray[Any, Any]:
    """K or V of tokens that begin at a place of the text, ``[heads, tokens, head_dim]`` uint16:
    another token, or another place, gives other rows."""
    ids = np.array(tokens, np.uint64)
    places = np.arange(start, start + len(ids), dtype=np.uint64)
    keys = (ids * np.uint64(40503) + places * np.uint64(2654435761)) >> np.uint64(7)
    inside = np.arange(HEAD_DIM, dtype=np.uint16) * np.uint16(3) + np.uint16(9973 * plane)
    heads = np.arange(HEADS, dtype=np.uint16) * np.uint16(257)
    return keys.astype(np.uint16)[None, :, None] + inside + heads[:, None, None]


def wrong_planes(cache: Any, prompt: Sequence[int]) -> int:
    """How many of one layer's planes do not hold the prompt's ``rows``."""
    import mlx.core as mx

    wrong = 0
    for plane, array in enumerate((cache.keys, cache.values)):
        held = np.array(array.view(mx.uint16), copy=False)[0, :, : len(prompt)]
        wrong += not np.array_equal(held, rows(prompt, 0, plane))
    return wrong


# --- the Spark's process --------------------------------------------------------------------


def paged_layer(
    blocks: int, heads: int = HEADS, block_size: int = BLOCK, width: int = HEAD_DIM
) -> tuple[Any, Any]:
    """A paged cache of zeros, ``[2, blocks, heads, block_size, width]`` in bf16, and its
    ``PagedLayout``: plain, as vLLM's CPU and several GPU backends lay it out."""
    import torch

    from vllm_mac_decode.worker.numbers import Numbers
    from vllm_mac_decode.worker.paged_layout import PagedLayout, PlaneMap

    torch.set_num_threads(1)  # on the real machine the GPU gathers
    block = heads * block_size * width
    strides = (block_size * width, width, 1)
    layout = PagedLayout(
        blocks=blocks,
        block_size=block_size,
        heads=heads,
        widths=(width, width),
        numbers=Numbers(torch.bfloat16, torch.bfloat16),
        block_stride=block,
        keys=PlaneMap(0, strides, None),
        values=PlaneMap(blocks * block, strides, None),
    )
    return torch.zeros((2, blocks, heads, block_size, width), dtype=torch.bfloat16), layout


def exported(caches: Sequence[Any], layout: Any) -> dict[str, Any]:
    """An exporter's layers."""
    from mlx_receiver.wire.layout import FULL
    from vllm_mac_decode.worker.paged_cache import ExportedLayer

    return {
        f"layers.{index}": ExportedLayer(index, cache, layout, 0, FULL, layout.block_size)
        for index, cache in enumerate(caches)
    }


class Paged:
    """An exporter's layers, all of one layer's memory, and the text that lies in it."""

    def __init__(self, tokens: int) -> None:
        """Room for that many tokens."""
        import torch

        cache, layout = paged_layer(-(-tokens // BLOCK))
        self._raw = cache.view(torch.int16).numpy().view(np.uint16)
        self._text: list[int] = []
        self.layers = exported([cache] * LAYERS, layout)

    def write(self, prompt: list[int]) -> None:
        """Have the prompt's rows in it."""
        start = longest_common(prompt, [self._text])
        start -= start % BLOCK
        padded = prompt[start:] + [0] * (-len(prompt) % BLOCK)
        first, count = start // BLOCK, len(padded) // BLOCK
        for plane in range(2):
            new = rows(padded, start, plane).reshape(HEADS, count, BLOCK, HEAD_DIM)
            self._raw[plane, first : first + count] = new.swapaxes(0, 1)
        self._text = prompt


class Sending:
    """The real exporter, and a line to the other process."""

    def __init__(self, told_json: str, control: str, layers: dict[str, Any]) -> None:
        from vllm_mac_decode.export import DataTarget
        from vllm_mac_decode.settings import Settings
        from vllm_mac_decode.worker.exporter import Exporter
        from vllm_mac_decode.worker.ledger import BlockLedger

        receiver = json.loads(told_json)
        endpoint = msgspec.convert(receiver["endpoint"], Endpoint)
        ticket = msgspec.convert(receiver["ticket"], DataTicket)
        self._target = DataTarget(endpoint, "receiver", ticket)
        self._layers, self._ledger = layers, BlockLedger()
        settings = Settings(transport=endpoint.transport, stall_timeout=30.0)
        self._exporter = Exporter(layers, settings, self._ledger)
        self.lines = Lines(socket.create_connection((endpoint.host, int(control))))

    def prefill(
        self, spans: list[Any], session: int, begins: float, seconds: float, streams: bool = True
    ) -> float:
        """One step of vLLM's, which takes so long, and when it ends. Where it ``streams``, each
        layer leaves as soon as it has been computed."""
        self._exporter.begin_step(spans, [], {session: self._target})
        for index, name in enumerate(self._layers):
            sleep_until(begins + seconds * (index + 1) / len(self._layers))
            if streams:
                self._exporter.layer_written(name)
        self._exporter.end_step()
        return begins + seconds

    def over(self, session: int, request: str = "") -> None:
        """The session has ended; wait until the blocks of the ``request`` are free."""
        self._exporter.begin_step([], [session], {})
        while request and request not in self._ledger.finished({request}):
            time.sleep(0.001)

    def close(self) -> None:
        """End its threads."""
        self._exporter.close()
