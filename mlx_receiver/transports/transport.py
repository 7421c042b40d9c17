"""What a data transport must do, on both ends. ``tcp`` is the built-in one.

A transport moves BLOCK frames (``frames``) from a vLLM worker into memory that the receiver
names, without a copy in between, and carries a few small replies back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mlx_receiver.wire.frames import DataReply, Header
from mlx_receiver.wire.messages import Code, DataTicket, Endpoint

__all__ = ["BlockSink", "Landing", "Listener", "Sender", "Transport", "TransportError"]


class TransportError(ConnectionError):
    """The connection cannot be used any further: refused, reset, or silent for too long."""


@dataclass(slots=True)
class Landing:
    """Where one block's payload goes.

    ``buffers`` are written in order and together hold exactly ``Header.payload_bytes``;
    ``commit`` is called once they are full and may raise WireError (``block``); ``abort`` instead
    when the payload did not arrive whole, or was not what was sent.
    """

    buffers: list[memoryview]
    commit: Callable[[], None] = field(default=lambda: None)
    abort: Callable[[], None] = field(default=lambda: None)


class BlockSink(Protocol):
    """The receiver's side of a transport: who may send, and where blocks go.

    Called from the transport's own threads, several at once. ``client`` is whose ticket the
    connection has shown (``DataTicket.client``): a client reaches its own sessions only.
    """

    def data_key(self, client: str) -> bytes:
        """The key of a client's ticket. Raises WireError (``credentials``) for an unknown client,
        which closes the connection."""

    def attach(self, client: str, session: int, reply: Callable[[DataReply], None]) -> None:
        """Call ``reply`` once it is known whether the session may receive blocks."""

    def detached(self, client: str, session: int) -> None:
        """The connection on which the session was attached is gone, where the transport can tell
        (``zmq`` cannot: there the sender's side notices, and the receiver's own clock)."""

    def landing(self, client: str, header: Header) -> Landing:
        """Memory for a block. Raises WireError; the payload is then read and thrown away."""

    def rejected(self, client: str, header: Header, code: Code, reason: str) -> None:
        """A block of the session was refused after its header was read."""


class Listener(Protocol):
    """The receiving end."""

    @property
    def endpoint(self) -> Endpoint:
        """Where it listens."""

    def close(self) -> None:
        """Stop listening, close every connection, join the threads."""


class Sender(Protocol):
    """The sending end: one connection of one vLLM worker. Used from one thread at a time."""

    def send(self, header: Header, payload: Sequence[memoryview] = ()) -> None:
        """Send a frame; blocks while the network or the receiver is behind.

        ``payload`` may be reused as soon as this returns. Raises TransportError when the peer
        has taken nothing for the connection's timeout.
        """

    def replies(self) -> list[DataReply]:
        """Replies that have arrived since the last call; never blocks.

        Raises TransportError when the connection is gone.
        """

    def close(self) -> None:
        """Close the connection; safe to call twice."""


class Transport(Protocol):
    """A named pair of ends, registered through ``hooks``."""

    name: str

    def listen(self, host: str, port: int, sink: BlockSink, plain: bool = False) -> Listener:
        """Listen on ``host:port`` (0: any free port); ``plain`` as the ``Endpoint`` is to say it.

        Raises OSError when it cannot.
        """

    def connect(self, endpoint: Endpoint, ticket: DataTicket, timeout: float) -> Sender:
        """Connect within ``timeout`` seconds, which also bounds a stalled ``send``.

        Between machines blocks are encrypted, unless ``Endpoint.plain`` allows less. Raises
        TransportError naming the address, also for a receiver that cannot prove that it gave the
        ticket, or where blocks cannot be encrypted and must be: it gets nothing.
        """
