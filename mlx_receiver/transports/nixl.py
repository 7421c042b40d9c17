"""The ``nixl`` transport: payloads go as NIXL (UCX) writes, everything else over TCP. Linux only.

The receiver registers a ring of slots for each connection and tells the sender where it is. A
frame's header comes over TCP, its payload slot by slot: the sender copies a piece into its own
ring, writes it into the receiver's with its number as notification, and the receiver copies it
into the cache and returns a CREDIT. So a peer can only ever write into its own ring, memory is
bounded on both sides, and no memory of a session is registered with a device.

UCX's own ports know no ticket, and nothing encrypts the payloads: between machines this transport
must be allowed on both sides (``Endpoint.plain``). What goes over TCP is authenticated there.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import select
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Sequence
from typing import Annotated, Any, Final

import msgspec
import numpy as np
from msgspec import Meta

from mlx_receiver.transports.carrier import BackChannel
from mlx_receiver.transports.seal import Opener, bare_level_for
from mlx_receiver.transports.tcp import TcpSender, dial
from mlx_receiver.transports.tcp_listener import TcpListener
from mlx_receiver.transports.transport import BlockSink, Listener, Sender, TransportError
from mlx_receiver.wire.frames import DataReply, Header, Kind, decode_reply
from mlx_receiver.wire.messages import DataTicket, Endpoint, WireError

SLOT_BYTES: Final = 2 << 20
SLOTS: Final = 16

#: Polls without news before a waiting thread sleeps in between, and how long (seconds).
_SPINS: Final = 50
_NAP: Final = 50e-6

#: How long, in seconds, a payload may take to arrive after its sender has closed the connection.
_LAST_SECONDS: Final = 1.0


class Ring(msgspec.Struct, frozen=True):
    """The receiver's first words: its ring, and what NIXL needs to write there."""

    metadata: bytes
    address: Annotated[int, Meta(ge=1, le=2**63 - 1)]
    slots: Annotated[int, Meta(ge=1, le=64)]
    slot_bytes: Annotated[int, Meta(ge=1, le=16 << 20)]


class _Memory:
    """A NIXL agent with one registered ring."""

    def __init__(self, slots: int, slot_bytes: int) -> None:
        from nixl import nixl_agent, nixl_agent_config

        # It prints to standard output at INFO.
        logging.getLogger("nixl").setLevel(logging.WARNING)
        config = nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        self.agent: Any = nixl_agent(f"mac-decode-{uuid.uuid4().hex}", config)
        self.slot_bytes = slot_bytes
        self._bytes = np.zeros(slots * slot_bytes, np.uint8)
        self.address = self._bytes.ctypes.data
        self._registered = self.agent.register_memory(
            [(self.address, self._bytes.nbytes, 0, "")], "DRAM"
        )

    def slot(self, index: int, count: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The first ``count`` bytes of a slot."""
        return self._bytes[index * self.slot_bytes :][:count]

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self.agent.deregister_memory(self._registered)
        self.agent = None


class NixlSender:
    """See ``transport.Sender``. ``replies`` may be called while ``send`` waits."""

    def __init__(self, control: TcpSender, timeout: float) -> None:
        self._control = control
        self._timeout = timeout
        self._lock = threading.RLock()
        self._inbox: deque[DataReply] = deque()
        self._writes: deque[Any] = deque()  # handles of writes that are not done
        self._sent = self._credits = 0  # slots
        self._ring: Ring | None = None
        self._memory: _Memory | None = None
        self._peer = ""
        try:
            self._wait(lambda: self._ring is not None)
            assert self._ring is not None
            self._memory = _Memory(self._ring.slots, self._ring.slot_bytes)
            name = self._memory.agent.add_remote_agent(self._ring.metadata)
            self._peer = name.decode() if isinstance(name, bytes) else name
        except BaseException:
            self.close()
            raise

    def send(self, header: Header, payload: Sequence[memoryview] = ()) -> None:
        with self._lock:
            self._check()
            self._control.send(header)
            for piece in _pieces(payload, self._slot_bytes):
                self._write(piece)
            # Without a progress thread nothing moves once this returns.
            self._wait(lambda: not self._writes)

    @property
    def _slot_bytes(self) -> int:
        assert self._ring is not None
        return self._ring.slot_bytes

    def _write(self, piece: list[memoryview]) -> None:
        ring, memory = self._ring, self._memory
        assert ring is not None and memory is not None
        self._wait(lambda: self._sent - self._credits < ring.slots)
        index, count = self._sent % ring.slots, sum(part.nbytes for part in piece)
        slot, done = memory.slot(index, count), 0
        for part in piece:
            slot[done : done + part.nbytes] = np.frombuffer(part, np.uint8)
            done += part.nbytes
        agent, offset = memory.agent, index * ring.slot_bytes
        try:
            local = agent.get_xfer_descs([(memory.address + offset, count, 0)], "DRAM")
            remote = agent.get_xfer_descs([(ring.address + offset, count, 0)], "DRAM")
            number = str(self._sent).encode()
            handle = agent.initialize_xfer("WRITE", local, remote, self._peer, number)
            if agent.transfer(handle) == "ERR":
                raise RuntimeError("the write was refused")
        except Exception as error:
            self._fail(f"NIXL cannot write: {error}")
        self._writes.append(handle)
        self._sent += 1

    def _wait(self, ready: Any) -> None:
        """Drive writes and read what the receiver sent until ``ready()``."""
        until, polls = time.monotonic() + self._timeout, 0
        while not ready():
            moved = self._progress()
            polls += 1
            if polls % _SPINS == 1 or not self._writes:
                moved = self._take() or moved
            if moved:
                until, polls = time.monotonic() + self._timeout, 1
            elif polls > _SPINS:
                if time.monotonic() > until:
                    self._fail(f"{self._control.peer} has taken nothing for too long")
                time.sleep(_NAP)

    def _progress(self) -> bool:
        """Whether a write was finished."""
        if not self._writes or self._memory is None:
            return False
        agent = self._memory.agent
        try:
            state = agent.check_xfer_state(self._writes[0])
            if state == "PROC":
                return False
            if state != "DONE":
                raise RuntimeError(state)
            agent.release_xfer_handle(self._writes.popleft())
        except Exception as error:
            self._fail(f"the connection to {self._control.peer} broke: {error}")
        return True

    def _take(self) -> bool:
        """Read what the receiver sent; whether there was anything."""
        try:
            frames = self._control.frames()
            for header, body in frames:
                if header.kind is Kind.CREDIT and not body:
                    self._credits += 1
                elif header.kind is Kind.CREDIT:
                    self._ring = msgspec.msgpack.decode(body, type=Ring)
                else:
                    self._inbox.append(decode_reply(body))
        except TransportError:
            self.close()
            raise
        except (WireError, msgspec.MsgspecError) as error:
            self._fail(f"{self._control.peer} sends what cannot be read: {error}")
        return bool(frames)

    def _fail(self, reason: str) -> None:
        self.close()
        raise TransportError(reason)

    def _check(self) -> None:
        if self._memory is None:
            raise TransportError(f"the connection to {self._control.peer} is closed")

    def replies(self) -> list[DataReply]:
        # A send in progress reads what arrives by itself.
        if self._lock.acquire(blocking=False):
            try:
                self._check()
                self._take()
            finally:
                self._lock.release()
        return [self._inbox.popleft() for _ in range(len(self._inbox))]

    def flush(self) -> None:
        """Wait until everything sent has landed. Raises TransportError as ``send`` does."""
        with self._lock:
            self._wait(lambda: self._credits == self._sent)

    def close(self) -> None:
        with self._lock:
            memory, self._memory = self._memory, None
            if memory is not None:
                while self._writes:
                    with contextlib.suppress(Exception):
                        memory.agent.release_xfer_handle(self._writes.popleft())
                with contextlib.suppress(Exception):
                    memory.agent.remove_remote_agent(self._peer)
                memory.close()
            self._control.close()


def _pieces(payload: Sequence[memoryview], limit: int) -> list[list[memoryview]]:
    """The payload cut into pieces of ``limit`` bytes, the last one shorter."""
    pieces: list[list[memoryview]] = []
    room = 0
    for part in payload:
        while part.nbytes:
            if not room:
                pieces.append([])
                room = limit
            pieces[-1].append(part[:room])
            part, room = part[room:], room - min(room, part.nbytes)
    return pieces


class NixlCarrier:
    """The receiver's ring of one connection; a ``carrier.Carrier``."""

    def __init__(self, sock: socket.socket, back: BackChannel, opener: Opener) -> None:
        self._back = back
        self._memory = _Memory(SLOTS, SLOT_BYTES)
        self._taken = 0  # slots
        self._arrived: set[int] = set()
        self._hangup = select.poll()
        rdhup = getattr(select, "POLLRDHUP", 0)  # Linux's, as NIXL is
        self._hangup.register(sock, rdhup | select.POLLHUP | select.POLLERR)
        metadata = self._memory.agent.get_agent_metadata()
        ring = Ring(metadata, self._memory.address, SLOTS, SLOT_BYTES)
        back.post(Kind.CREDIT, body=msgspec.msgpack.encode(ring))

    def fill(self, header: Header, buffers: Sequence[memoryview], wanted: bool) -> None:
        left = header.payload_bytes
        targets = deque(buffer for buffer in buffers if buffer.nbytes)
        while left:
            count = min(left, SLOT_BYTES)
            self._await(self._taken)
            slot = self._memory.slot(self._taken % SLOTS, count)
            done = 0
            while done < count:
                target = targets.popleft()
                size = min(target.nbytes, count - done)
                np.copyto(np.frombuffer(target[:size], np.uint8), slot[done : done + size])
                done += size
                if size < target.nbytes:
                    targets.appendleft(target[size:])
            left -= count
            self._taken += 1
            self._back.post(Kind.CREDIT)

    def _await(self, number: int) -> None:
        """Wait until the write of that number is here."""
        polls, until = 0, None
        while number not in self._arrived:
            try:
                for numbers in self._memory.agent.get_new_notifs().values():
                    self._arrived.update(map(int, numbers))
            except Exception as error:
                raise TransportError(f"NIXL: {error}") from None
            if len(self._arrived) > SLOTS:
                raise TransportError("NIXL: more writes than the ring has slots")
            polls += 1
            if polls > _SPINS:
                if until is None and self._hangup.poll(0):
                    until = time.monotonic() + _LAST_SECONDS
                if until is not None and time.monotonic() > until:
                    raise TransportError("the connection closed inside a frame")
                time.sleep(_NAP)
        self._arrived.discard(number)

    def close(self) -> None:
        self._memory.close()


class NixlTransport:
    """See ``transport.Transport``."""

    name = "nixl"

    def listen(self, host: str, port: int, sink: BlockSink, plain: bool = False) -> Listener:
        # Loading it takes seconds, which the first client would have to wait.
        importlib.import_module("nixl")
        return TcpListener(host, port, sink, name="nixl", carrier=NixlCarrier, plain=plain)

    def connect(self, endpoint: Endpoint, ticket: DataTicket, timeout: float) -> Sender:
        control = TcpSender(dial(endpoint, ticket, timeout, bare_level_for))
        return NixlSender(control, timeout)
