"""The sending end of a vLLM worker: its connections to the receiver and what is sent on them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mlx_receiver.wire.frames import DataHello, DataReply, Header, Kind
from mlx_receiver.wire.hooks import transport
from mlx_receiver.wire.landing import checksum
from mlx_receiver.wire.transport import Sender, TransportError
from vllm_mac_decode.metadata import BulkTarget
from vllm_mac_decode.settings import Settings
from vllm_mac_decode.staging import DeviceClock, Slot, StagingRing

#: A header without times, and its payload.
Frame = tuple[Header, Sequence[memoryview]]


@dataclass(frozen=True, slots=True)
class Staged:
    """Frames of one session in a staging slot, and what to call when their bytes are there."""

    slot: Slot
    frames: Sequence[Frame]
    staged: Callable[[], None] | None = None


class _Connection:
    """One connection, used by its sending thread and, for ATTACH and replies, the gathering one."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender
        self._lock = threading.Lock()

    def send(self, header: Header, payload: Sequence[memoryview] = ()) -> None:
        """See ``transport.Sender.send``."""
        with self._lock:
            self._sender.send(header, payload)

    def replies(self, wait: bool) -> list[DataReply]:
        """See ``transport.Sender.replies``; without ``wait`` nothing while it is sending."""
        if not self._lock.acquire(blocking=wait):
            return []
        try:
            return self._sender.replies()
        finally:
            self._lock.release()

    def close(self) -> None:
        """See ``transport.Sender.close``; a send in progress ends first."""
        with self._lock:
            self._sender.close()


class Bulk:
    """``settings.streams`` connections to one receiver; each has a thread that sends on it.

    A thread sends what comes next in the queue: blocks may arrive in any order. All connections
    stand and fall together, because a session's blocks are spread over all of them.
    """

    def __init__(
        self,
        settings: Settings,
        ring: StagingRing,
        clock: DeviceClock | None,
        is_dead: Callable[[int], bool],
        fail: Callable[[int, str], None],
    ) -> None:
        """``is_dead`` tells sessions that no longer matter, ``fail`` gives one up."""
        self._settings = settings
        self._ring = ring
        self._clock = clock
        self._is_dead = is_dead
        self._fail = fail
        self._queue: queue.SimpleQueue[Staged | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of the next two
        self._connections: list[_Connection] = []
        self._target: BulkTarget | None = None

    # --- the gathering thread ---------------------------------------------------------------

    def attach(self, session: int, target: BulkTarget | None) -> None:
        """Ask the receiver, on every connection, whether the session may receive blocks.

        Connects first where that is needed. Raises TransportError, and ValueError for a transport
        that is not installed.
        """
        if target is None:
            raise TransportError("no receiver is connected")
        for connection in self._connected(target):
            connection.send(Header(kind=Kind.ATTACH, session=session, payload_bytes=0))

    def put(self, staged: Staged) -> None:
        """Send it, after what was put before."""
        self._queue.put(staged)

    def replies(self, wait: bool) -> list[DataReply]:
        """What the receiver has answered; ``wait``: also on connections that are sending now,
        whose threads would notice by themselves that they broke.

        Raises TransportError when there is no connection any more, WireError and MsgspecError
        when the answers cannot be read.
        """
        with self._lock:
            connections = self._connections
        if not connections:
            raise TransportError("the bulk connection is gone")
        return [reply for connection in connections for reply in connection.replies(wait)]

    def _connected(self, target: BulkTarget) -> list[_Connection]:
        with self._lock:
            if self._connections and self._target == target:
                return self._connections
            stale, self._connections = self._connections, []
        _close(stale)
        made: list[_Connection] = []
        try:
            for _ in range(self._settings.streams):
                made.append(_Connection(self._dial(target)))
        except BaseException:
            _close(made)
            raise
        with self._lock:
            self._connections, self._target = made, target
        return made

    def _dial(self, target: BulkTarget) -> Sender:
        return transport(target.endpoint.transport).connect(
            target.endpoint,
            DataHello(token=self._settings.token, client=target.client),
            timeout=self._settings.stall_timeout,
        )

    # --- any thread -------------------------------------------------------------------------

    def drop(self) -> None:
        """Close all connections."""
        with self._lock:
            connections, self._connections = self._connections, []
        _close(connections)

    def close(self) -> None:
        """End the sending threads and the connections."""
        for _ in range(self._settings.streams):
            self._queue.put(None)
        self.drop()

    # --- the sending threads ----------------------------------------------------------------

    def run(self, index: int) -> None:
        """Send on connection ``index``, until ``close``."""
        while (item := self._queue.get()) is not None:
            item.slot.wait()
            gathered = time.monotonic_ns()
            if item.staged is not None:
                item.staged()
            computed = self._clock.ns(item.slot.written) if self._clock is not None else None
            for frame in item.frames:
                header = frame[0]
                if not self._is_dead(header.session):
                    self._send(index, frame, computed or header.computed_ns, gathered)
            self._ring.release(item.slot)

    def _send(self, index: int, frame: Frame, computed: int, gathered: int) -> None:
        header, payload = frame
        with self._lock:
            connections = self._connections
        try:
            if not connections:
                raise TransportError("the bulk connection is gone")
            timed = replace(
                header,
                checksum=checksum(payload) if self._settings.checksum else 0,
                computed_ns=computed,
                gathered_ns=gathered,
                sent_ns=time.monotonic_ns(),
            )
            connections[index].send(timed, payload)
        except TransportError as error:
            self._fail(header.session, str(error))
            with self._lock:
                if self._connections is connections:  # else they have been replaced
                    self._connections = []
            _close(connections)


def _close(connections: Sequence[_Connection]) -> None:
    for connection in connections:
        connection.close()
