"""KV over the real transport, on this machine alone, into the memory that MLX decodes from."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from mlx_receiver.checks.finding import Finding
from mlx_receiver.transports.tcp import TcpTransport
from mlx_receiver.transports.transport import Landing, Sender, TransportError
from mlx_receiver.wire.frames import DataReply, Header, Kind, blocks
from mlx_receiver.wire.keys import new_ticket
from mlx_receiver.wire.layout import full_attention
from mlx_receiver.wire.messages import E_CREDENTIALS, Code, WireError

#: The shape of an 8B model's KV, of fewer layers, and blocks as vLLM's side sends them.
_LAYOUT: Final = full_attention(8, 8, 128, "bfloat16")
_TOKENS: Final = 8192
_BLOCK_TOKENS: Final = 2048

#: Bytes a second of a 10 Gbit/s link.
_LINK: Final = 1.25e9

_ROUNDS: Final = 3
_SECONDS: Final = 30.0


class _Sink:
    """Lands the blocks of one client (see ``transport.BlockSink``)."""

    def __init__(self, buffers: Any) -> None:
        self.ticket = new_ticket()
        self.refused = ""
        self.landed = threading.Semaphore(0)
        self._buffers = buffers

    def data_key(self, client: str) -> bytes:
        if client != self.ticket.client:
            raise WireError(E_CREDENTIALS, "another program connects to this check")
        return self.ticket.key

    def attach(self, client: str, session: int, reply: Callable[[DataReply], None]) -> None:
        reply(DataReply(session, True))

    def detached(self, client: str, session: int) -> None:
        pass

    def landing(self, client: str, header: Header) -> Landing:
        tokens = slice(header.token_start, header.token_start + header.tokens)
        rows = self._buffers.rows(header.layer, header.part, slice(0, header.heads), tokens)

        def commit() -> None:
            rows.buffers.clear()
            rows.written()
            self.landed.release()

        return Landing(rows.buffers, commit, rows.dropped)

    def rejected(self, client: str, header: Header, code: Code, reason: str) -> None:
        self.refused = reason


def check_loopback(transport: Any = None) -> Finding:
    """Every byte arrives, and faster than a 10 Gbit/s cable carries it."""
    import mlx.core as mx

    from mlx_receiver.caches.model import ModelCache
    from mlx_receiver.caches.plain import PlainKV

    name = "loopback"
    transport = transport or TcpTransport()
    buffers = ModelCache(_LAYOUT, [PlainKV()]).allocate(_LAYOUT, _TOKENS, 1)
    while buffers.grow():
        pass
    sink = _Sink(buffers)
    keys = _LAYOUT.layers[0].parts[0]
    headers = list(blocks(1, _TOKENS, _LAYOUT, 2 * keys.row * _BLOCK_TOKENS))
    shape = (keys.heads, _BLOCK_TOKENS, keys.width)
    rows = np.random.default_rng(0).integers(0, 1 << 14, shape)
    block = rows.astype(np.uint16)
    payload = [memoryview(head).cast("B") for head in block]
    try:
        listener = transport.listen("127.0.0.1", 0, sink)
    except OSError as error:
        return Finding(name, "wrong", f"nothing can listen on 127.0.0.1 ({error})", _LOOK)
    try:
        sender = transport.connect(listener.endpoint, sink.ticket, 5.0)
        sender.send(Header(Kind.ATTACH, 1, 0))
        # The first time makes the pages of both sides' buffers.
        seconds = min(_timed(sender, sink, headers, payload) for _ in range(_ROUNDS))
        sender.close()
    except (TransportError, TimeoutError) as error:
        return Finding(name, "wrong", sink.refused or str(error), _LOOK)
    finally:
        listener.close()
    size = sum(header.payload_bytes for header in headers)
    caches = buffers.build()
    repeated = np.concatenate([block] * (_TOKENS // _BLOCK_TOKENS), axis=1)
    for cache in caches:
        for array in (cache.keys, cache.values):
            held = np.array(array.view(mx.uint16), copy=False)[0, :, :_TOKENS]
            if not np.array_equal(held, repeated):
                return Finding(name, "wrong", "MLX holds other bytes than were sent", _LOOK)
    rate = size / seconds
    figures: dict[str, str | float] = {"GB/s": round(rate / 1e9, 2)}
    seen = f"{size / 1e6:.0f} MB into MLX memory at {rate / 1e9:.1f} GB/s, every byte right"
    if rate < _LINK:
        return Finding(
            name, "warning", f"{seen}; a 10 Gbit/s cable carries {_LINK / 1e9:.2f}",
            "Is this machine busy with something else, or in low power mode?", figures,
        )  # fmt: skip
    return Finding(name, "fine", seen, figures=figures)


_LOOK: Final = "Does a VPN or a security program watch connections of this machine to itself?"


def _timed(
    sender: Sender, sink: _Sink, headers: Sequence[Header], payload: Sequence[memoryview]
) -> float:
    """Seconds until every block has landed. Raises TransportError, TimeoutError."""
    began = time.perf_counter()
    for header in headers:
        sender.send(header, payload)
    for _ in headers:
        if not sink.landed.acquire(timeout=_SECONDS):
            raise TimeoutError("not every block arrived")
    return time.perf_counter() - began
