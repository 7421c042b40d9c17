"""The sending end of a vLLM worker: its connections to the receiver and what is sent on them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from vllm.logger import init_logger

from mlx_receiver.plugins import transport
from mlx_receiver.transports.landing import checksum
from mlx_receiver.transports.transport import Sender, TransportError
from mlx_receiver.wire.frames import DataReply, Header, Kind
from mlx_receiver.wire.seldom import printable
from vllm_mac_decode.export import DataTarget
from vllm_mac_decode.settings import Settings
from vllm_mac_decode.worker.bottleneck import Bottleneck
from vllm_mac_decode.worker.staging import DeviceClock, Slot, StagingRing

logger = init_logger("vllm.mac_decode.data")

#: How long a data port that could not be reached is left alone: at first, and at most.
_PAUSE_SECONDS: Final = (1.0, 15.0)

#: A header without times, and its payload.
Frame = tuple[Header, Sequence[memoryview]]


@dataclass(frozen=True, slots=True)
class Staged:
    """Frames of one session in a staging slot, and what to call when their bytes are there."""

    slot: Slot
    frames: Sequence[Frame]
    staged: Callable[[], None] | None = None


class _Connection:
    """A ``transport.Sender``, used by its sending thread and, for ATTACH and replies, the gathering
    one."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender
        self._lock = threading.Lock()

    def send(self, header: Header, payload: Sequence[memoryview] = ()) -> None:
        with self._lock:
            self._sender.send(header, payload)

    def replies(self, wait: bool) -> list[DataReply]:
        """Without ``wait`` nothing while it is sending."""
        if not self._lock.acquire(blocking=wait):
            return []
        try:
            return self._sender.replies()
        finally:
            self._lock.release()

    def close(self) -> None:
        """A send in progress ends first."""
        with self._lock:
            self._sender.close()


class DataChannel:
    """``settings.streams`` connections to one receiver; each has a thread that sends on it.

    A thread sends what comes next in the queue: blocks may arrive in any order. All connections
    stand and fall together, because a session's blocks are spread over all of them. They are made
    by a thread of their own, one set at a time; a receiver that could not be reached is left alone
    for a while. Where ``streams`` is "auto", the second one is made when the first holds the export
    up (``bottleneck``), and from then on there are two.
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
        self._lock = threading.Lock()  # of what follows
        self._wider = threading.Condition(self._lock)
        self._streams = 1 if settings.streams == "auto" else settings.streams
        self._connections: list[_Connection] = []
        self._target: DataTarget | None = None  # of the connections
        self._generation = 0  # of the connections; counts those that were made
        self._dialling = False
        self._closed = False
        self._unreachable: DataTarget | None = None
        self._problem = ""
        self._pause = _PAUSE_SECONDS[0]
        self._again_at = 0.0

    # --- the gathering thread ---------------------------------------------------------------

    def attach(self, session: int, target: DataTarget | None) -> int:
        """Ask the receiver, on every connection, whether the session may receive blocks.

        Returns the connections' number (``generation``), or 0 while they are being made: then ask
        again. Raises TransportError when there are none, and will be none for a while.
        """
        if target is None:
            raise TransportError("no receiver is connected")
        with self._lock:
            current = self._target == target
        if not current:
            self.drop()
        with self._lock:
            connections, generation = self._connections, self._generation
            if not connections:
                self._dial(target)
                return 0
        for connection in connections:
            connection.send(Header(kind=Kind.ATTACH, session=session, payload_bytes=0))
        return generation

    @property
    def generation(self) -> int:
        """The number of the connections that stand now, 0 if there are none."""
        with self._lock:
            return self._generation if self._connections else 0

    def put(self, staged: Staged) -> None:
        """Send it, after what was put before."""
        self._queue.put(staged)

    def replies(self, wait: bool) -> list[DataReply]:
        """What the receiver has answered; ``wait``: also on connections that are sending now,
        whose threads would notice by themselves that they broke.

        Raises TransportError when a connection is gone, WireError when the answers cannot be read.
        """
        with self._lock:
            connections = self._connections
        return [reply for connection in connections for reply in connection.replies(wait)]

    # --- connecting -------------------------------------------------------------------------

    def _dial(self, target: DataTarget) -> None:
        """With the lock. Raises TransportError while the target is left alone."""
        if self._closed:
            raise TransportError("the export has ended")
        if self._dialling:
            return
        if target == self._unreachable and time.monotonic() < self._again_at:
            raise TransportError(self._problem)
        self._dialling = True
        threading.Thread(
            target=self._connect, args=(target, self._streams), name="mac-decode-dial", daemon=True
        ).start()

    def _connect(self, target: DataTarget, count: int) -> None:
        """The dialling thread: one attempt."""
        made: list[_Connection] = []
        problem = ""
        until = time.monotonic() + self._settings.stall_timeout
        try:
            for _ in range(count):
                left = max(until - time.monotonic(), 0.01)
                made.append(_Connection(self._dialled(target, left)))
        except (TransportError, ValueError) as error:
            problem = str(error)
        except Exception as error:
            logger.exception("connecting to the receiver's data port failed")
            problem = str(error)
        with self._lock:
            self._dialling = False
            if problem:
                # One line for a receiver: every session would say the same.
                new = target != self._unreachable
                self._pause = _PAUSE_SECONDS[0] if new else min(2 * self._pause, _PAUSE_SECONDS[1])
                self._unreachable, self._problem = target, problem
                self._again_at = time.monotonic() + self._pause
                if new and not self._closed:
                    logger.warning("no KV can be sent: %s", printable(problem))
            elif not self._closed:
                self._connections, self._target, made = made, target, []
                self._generation += 1
                self._unreachable = None
                self._wider.notify_all()
        _close(made)

    def _widen(self) -> None:
        """One connection is not enough: have a second one beside it, without a pause in between."""
        with self._lock:
            if self._streams > 1 or self._closed or self._target is None:
                return
            self._streams = 2
            target, generation = self._target, self._generation
        logger.info("a second connection to the receiver: the first one holds the export up")
        threading.Thread(
            target=self._add, args=(target, generation), name="mac-decode-dial", daemon=True
        ).start()

    def _add(self, target: DataTarget, generation: int) -> None:
        """The dialling thread, for the second connection. If it cannot be made one must do: those
        that are made after a break are two again."""
        try:
            second = _Connection(self._dialled(target, self._settings.stall_timeout))
        except (TransportError, ValueError) as error:
            logger.warning("no second connection to the receiver: %s", printable(str(error)))
            return
        with self._lock:
            standing = bool(self._connections) and self._generation == generation
            if standing and not self._closed:
                self._connections = [*self._connections, second]
                self._wider.notify_all()
                return
        second.close()

    def _dialled(self, target: DataTarget, timeout: float) -> Sender:
        return transport(target.endpoint.transport).connect(
            target.endpoint, target.ticket, timeout=timeout
        )

    # --- any thread -------------------------------------------------------------------------

    def drop(self, generation: int = 0) -> None:
        """Close all connections; with ``generation``, only if they are still those."""
        with self._lock:
            if generation and generation != self._generation:
                return
            connections, self._connections = self._connections, []
        _close_elsewhere(connections)

    def close(self) -> None:
        """End the sending threads and the connections."""
        with self._lock:
            self._closed = True
            self._wider.notify_all()
        for _ in range(self._settings.most_streams):
            self._queue.put(None)
        self.drop()

    # --- the sending threads ----------------------------------------------------------------

    def run(self, index: int) -> None:
        """Send on connection ``index``, once there is one, until ``close``."""
        with self._wider:
            self._wider.wait_for(lambda: self._closed or index < max(1, len(self._connections)))
        bottleneck = Bottleneck()
        while (item := self._queue.get()) is not None:
            item.slot.wait()
            gathered = time.monotonic_ns()
            if item.staged is not None:
                item.staged()
            computed = self._clock.ns(item.slot.written) if self._clock is not None else None
            for frame in item.frames:
                header = frame[0]
                if not self._is_dead(header.session):
                    seconds = self._send(index, frame, computed or header.computed_ns, gathered)
                    waiting = not self._queue.empty()
                    if bottleneck.sent(header.payload_bytes, seconds, waiting):
                        self._widen()
            self._ring.release(item.slot)

    def _send(self, index: int, frame: Frame, computed: int, gathered: int) -> float:
        """Send a frame; the seconds that it took."""
        header, payload = frame
        with self._lock:
            connections, generation = self._connections, self._generation
        try:
            if index >= len(connections):
                raise TransportError("the data connection is gone")
            timed = replace(
                header,
                checksum=checksum(payload) if self._settings.checksum else 0,
                computed_ns=computed,
                gathered_ns=gathered,
                sent_ns=time.monotonic_ns(),
            )
            began = time.perf_counter()
            connections[index].send(timed, payload)
            return time.perf_counter() - began
        except TransportError as error:
            self._fail(header.session, str(error))
            self.drop(generation)
            return 0.0


def _close(connections: Sequence[_Connection]) -> None:
    for connection in connections:
        connection.close()


def _close_elsewhere(connections: Sequence[_Connection]) -> None:
    """Without waiting for a send that is stuck: it ends by its own timeout."""
    if connections:
        threading.Thread(
            target=_close, args=(connections,), name="mac-decode-hang-up", daemon=True
        ).start()
