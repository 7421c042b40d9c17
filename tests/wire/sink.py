"""A receiver's end in plain memory, and blocks to send to it."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from mlx_receiver.transports.transport import Landing
from mlx_receiver.wire.frames import DataReply, Header, Kind
from mlx_receiver.wire.keys import new_ticket
from mlx_receiver.wire.messages import E_CREDENTIALS, E_SESSION, DataTicket, WireError

#: Two clients that every ``MemorySink`` knows.
TICKET, OTHER = new_ticket(), new_ticket()

#: Sessions that ``MemorySink`` refuses, accepts after a while, and has a fault with.
REFUSED, LATER, FAULTY = 404, 202, 500


@dataclass
class MemorySink:
    """Keeps what lands. Closing ``gate`` makes it slow."""

    clients: list[DataTicket] = field(default_factory=lambda: [TICKET, OTHER])
    landed: dict[tuple[int, int], bytes] = field(default_factory=dict)
    #: Which client's block it was.
    owners: dict[tuple[int, int], str] = field(default_factory=dict)
    order: list[tuple[int, int]] = field(default_factory=list)
    refusals: list[tuple[int, str]] = field(default_factory=list)
    attachments: list[tuple[str, int]] = field(default_factory=list)
    replies: list[Callable[[DataReply], None]] = field(default_factory=list)
    detachments: list[tuple[str, int]] = field(default_factory=list)
    aborted: int = 0
    pending: int = 0
    gate: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.gate.set()

    def data_key(self, client: str) -> bytes:
        for ticket in self.clients:
            if ticket.client == client:
                return ticket.key
        raise WireError(E_CREDENTIALS, "nobody knows this client")

    def attach(self, client: str, session: int, reply: Callable[[DataReply], None]) -> None:
        with self.lock:
            self.attachments.append((client, session))
            self.replies.append(reply)
        if session == FAULTY:
            raise RuntimeError("a fault of the receiver")
        if session == REFUSED:
            reply(DataReply(session, False, E_SESSION, "not here"))
        elif session == LATER:
            threading.Timer(0.2, reply, [DataReply(session, True)]).start()
        else:
            reply(DataReply(session, True))

    def detached(self, client: str, session: int) -> None:
        with self.lock:
            self.detachments.append((client, session))

    def landing(self, client: str, header: Header) -> Landing:
        self.gate.wait()
        if header.session == REFUSED:
            raise WireError(E_SESSION, "not here")
        if header.session == FAULTY:
            raise RuntimeError("a fault of the receiver")
        # As scattered as a cache: one buffer a head.
        rows = [bytearray(header.payload_bytes // header.heads) for _ in range(header.heads)]
        with self.lock:
            self.pending += 1

        def commit() -> None:
            with self.lock:
                key = (header.session, header.layer)
                self.landed[key] = b"".join(rows)
                self.owners[key] = client
                self.order.append(key)
                self.pending -= 1

        def abort() -> None:
            with self.lock:
                self.aborted += 1
                self.pending -= 1

        return Landing([memoryview(row) for row in rows], commit, abort)

    def rejected(self, client: str, header: Header, code: str, reason: str) -> None:
        with self.lock:
            self.refusals.append((header.session, code))

    def wait(self, ready: Callable[[], bool], seconds: float = 30.0) -> None:
        """Until ``ready()``, for what comes through another thread."""
        until = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < until, f"after {seconds} s: {self}"[:500]
            time.sleep(0.005)


def make_block(
    session: int,
    number: int,
    heads: int = 4,
    tokens: int = 16,
    width: int = 8,
    checksum: int = 0,
) -> tuple[Header, list[memoryview]]:
    """A block of random bytes in one part for each head, as the exporter sends them."""
    source = random.Random(f"{session} {number}")
    rows = [memoryview(source.randbytes(2 * tokens * width)) for _ in range(heads)]
    header = Header(
        kind=Kind.BLOCK,
        session=session,
        payload_bytes=2 * heads * tokens * width,
        layer=number,
        part=1,
        heads=heads,
        width=width,
        tokens=tokens,
        checksum=checksum,
    )
    return header, rows


class Forged:
    """A header that says what no ``Header`` can."""

    def __init__(self, raw: bytes, payload_bytes: int = 0) -> None:
        self.raw = raw
        self.payload_bytes = payload_bytes
        self.session = 1

    def pack(self) -> bytes:
        return self.raw
