"""The control connection to one receiver: a background thread in vLLM's engine process.

Connects whenever the receiver is there, says Hello, keeps the connection alive with Pings, and
hands every other message to a listener. A receiver that appears later, restarts or moves (the
host name is resolved again at every attempt) is found without restarting vLLM.

The thread alone touches ZeroMQ's sockets. Others put messages into a queue, and a byte into a pair
of sockets that wakes it.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import zmq

from mlx_receiver.pairing.keystore import PairingError
from mlx_receiver.wire import messages as m
from mlx_receiver.wire.addresses import is_this_machine
from mlx_receiver.wire.handshake import Introduction
from mlx_receiver.wire.seldom import printable
from vllm_mac_decode.export import DataTarget
from vllm_mac_decode.scheduler.candidates import Candidate, Candidates
from vllm_mac_decode.scheduler.control import ControlSocket, NoAnswer
from vllm_mac_decode.scheduler.paths import Paths
from vllm_mac_decode.settings import Settings

logger = logging.getLogger("vllm.mac_decode.link")

_PING_SECONDS: Final = 0.25
#: Messages come more often than anything has to be looked after.
_TICK_SECONDS: Final = 0.05
_RETRY_SECONDS: Final = (0.5, 1.0, 2.0, 5.0)
_REJECTED_SECONDS: Final = 10.0
_JOIN_SECONDS: Final = 2.0
#: Messages that are taken up before the clock is looked at again.
_AT_ONCE: Final = 256


class LinkListener(Protocol):
    """Called from the link's thread."""

    def taken(self, receiver: str) -> bool:
        """Whether another link is connected to that receiver (``Welcome.receiver``)."""

    def connected(self, welcome: m.Welcome) -> bool:
        """The receiver accepts sessions. False: it is taken."""

    def disconnected(self, reason: str) -> None:
        """Every session is lost."""

    def message(self, message: m.ReceiverMessage, arrived: float) -> None:
        """Anything else that the receiver says, and when it came (``time.perf_counter()``).
        Raises Unusable."""

    def idle(self) -> bool:
        """Whether no hand-off is under way."""

    def tick(self, now: float) -> None:
        """A few times a second, connected or not; ``now`` is ``time.monotonic()``."""


class Unusable(Exception):
    """What the receiver has said rules it out; the text says why."""


class _Lost(Exception):
    """The conversation is over; the text says why. ``pause``: seconds before the next one, 0 for
    the usual. ``nobody``: nothing listens there. ``refused``: the receiver itself said no."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause
        self.nobody = self.refused = False


class _Twin(Exception):
    """Another link is connected to the receiver, by another of its names."""

    def __init__(self, receiver: str) -> None:
        super().__init__()
        self.receiver = receiver


@dataclass(frozen=True)
class Problem:
    """Why a link has no receiver. ``nobody``: nothing listens there."""

    text: str
    nobody: bool = False


class Link:
    """Owns the thread. ``send``, ``target``, ``path``, ``problem`` and ``close`` may be used from
    any other."""

    def __init__(
        self,
        settings: Settings,
        me: Introduction,
        listener: LinkListener,
        found: Candidates,
        receiver: str,
        number: int = 0,
    ) -> None:
        """``receiver`` is one of ``found``'s; ``number`` tells the links apart."""
        self._settings = settings
        self._vocab_size = me.signature.vocab_size
        self._hello = me.hello()
        self._listener = listener
        self._found = found
        self._receiver = receiver
        self.number = number
        self._outbox: queue.SimpleQueue[m.ClientMessage] = queue.SimpleQueue()
        self._wake_lock = threading.Lock()
        self._wake_in, self._wake_out = socket.socketpair()
        for end in (self._wake_in, self._wake_out):
            end.setblocking(False)
        self._closing = False
        #: For messages: the receiver of the conversation.
        self.where = ""
        self._paths: Paths | None = None
        self._target: DataTarget | None = None
        #: Why the last attempt failed; None before there was one, and while it is connected.
        self.problem: Problem | None = None
        self._thread = threading.Thread(
            target=self._run, name=f"mac-decode-link-{number}", daemon=True
        )

    def start(self) -> None:
        """Begin to connect."""
        self._thread.start()

    @property
    def target(self) -> DataTarget | None:
        """Where workers send blocks; None while no receiver is connected."""
        return self._target

    def send(self, message: m.ClientMessage) -> bool:
        """Queue a message. False while no receiver is connected; what is queued when one is lost
        is lost, too, and then the listener hears of that."""
        if self._target is None:
            return False
        self._outbox.put(message)
        self._wake()
        return True

    def doubt(self) -> None:
        """Blocks did not arrive: perhaps another address of the receiver's still works."""
        if self._paths is not None:
            self._paths.doubt()

    @property
    def path(self) -> m.DataPath | None:
        """What was measured last of the way that blocks take; another object each time."""
        return self._paths.used if self._paths is not None else None

    def measure(self) -> bool:
        """Measure it again, for a moment, while nothing is sent. False where that cannot be
        done."""
        return self._paths is None or self._paths.again()

    def close(self, wait: bool = True) -> None:
        """Ask the thread to end, which frees its sockets, and (``wait``) wait for that a while."""
        self._closing = True
        self._wake()
        if wait and self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout=_JOIN_SECONDS)

    def _wake(self) -> None:
        # A full pipe means that a wake-up is pending already; a closed one, that nobody is there.
        with self._wake_lock, contextlib.suppress(OSError):
            self._wake_out.send(b"\0")

    # --- the thread -------------------------------------------------------------------------

    def _run(self) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            self._keep_conversing(context)
        finally:
            context.term()  # every socket is closed, without lingering
            with self._wake_lock:
                self._wake_in.close()
                self._wake_out.close()

    def _keep_conversing(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        attempt = 0
        while not self._closing:
            began = time.monotonic()
            pause = 0.0
            try:
                self._try_each(context)
            except _Lost as lost:
                pause = lost.pause
                self._over(Problem(str(lost), lost.nobody))
            except _Twin as twin:
                self._over(Problem("another link is connected to it", nobody=True))
                while not self._closing and self._listener.taken(twin.receiver):
                    self._rest(_RETRY_SECONDS[0])
            except Exception:
                logger.exception("the link to the receiver failed; it will be tried again")
                pause = _RETRY_SECONDS[-1]
                self._over(Problem("the link failed"))
            if time.monotonic() - began > 10:
                attempt = 0
            pause = pause or _RETRY_SECONDS[min(attempt, len(_RETRY_SECONDS) - 1)]
            attempt += 1
            self._rest(pause)
        self._over(Problem("this side is closing"))

    def _rest(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._closing and time.monotonic() < until:
            time.sleep(_PING_SECONDS / 2)
            with contextlib.suppress(Exception):  # one that lasts is logged while connected
                self._listener.tick(time.monotonic())

    def _over(self, problem: Problem) -> None:
        """The receiver is not connected any more, or still not."""
        connected, self._target = self._target is not None, None
        self.problem = None if connected else problem
        if not connected:
            return
        if not self._closing:
            logger.warning(
                "lost the receiver at %s: %s; responses go on locally", self.where, problem.text
            )
        try:
            self._listener.disconnected(problem.text)
        except Exception:
            logger.exception("responses that the receiver was decoding may be lost")

    def _try_each(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        """Converse by the first way on which the receiver welcomes us. Raises _Lost when that is
        over, or when there is none."""
        failures: list[_Lost] = []
        try:
            ways = self._found.ways(self._receiver)
        except PairingError as error:
            raise _Lost(str(error), _REJECTED_SECONDS) from None
        answered: set[bytes] = set()
        for candidate in ways:
            if self._closing:
                return
            if candidate.keys.receiver_public in answered:
                continue  # at another of its addresses: it would say the same
            try:
                self._converse(context, candidate)
                return
            except _Lost as lost:
                if self._target is not None:
                    raise
                failures.append(lost)
                if lost.refused:
                    answered.add(candidate.keys.receiver_public)
        # Who says no knows this machine, by one of the keys that were tried.
        failures = [lost for lost in failures if lost.refused] or failures
        reasons = "; ".join(dict.fromkeys(map(str, failures))) or "it is not found any more"
        last = _Lost(reasons, max((lost.pause for lost in failures), default=0.0))
        last.nobody = all(lost.nobody for lost in failures)
        raise last

    def _converse(self, context: zmq.Context[zmq.Socket[bytes]], candidate: Candidate) -> None:
        """One connection, from Hello to its end. Raises _Lost."""
        self.where = where = candidate.name
        try:
            with contextlib.closing(
                ControlSocket(context, candidate, self._settings.stall_timeout)
            ) as control:
                welcome = self._welcomed(control)
                if self._listener.taken(welcome.receiver):
                    raise _Twin(welcome.receiver)
                self._serve(control, welcome, lambda: self._found.hosts(candidate))
        except NoAnswer as error:
            again = error.kind in ("keys", "hung_up")
            lost = _Lost(str(error), _REJECTED_SECONDS if again else 0.0)
            lost.nobody = error.kind == "nobody"
            raise lost from None
        except m.WireError as error:
            raise _Lost(
                f"the receiver at {where} broke the protocol: {printable(error.reason)}",
                _REJECTED_SECONDS,
            ) from None
        except zmq.Again:
            raise _Lost("it reads nothing") from None

    def _welcomed(self, control: ControlSocket) -> m.Welcome:
        """The answer to Hello. Raises _Lost, NoAnswer and WireError."""
        until = time.monotonic() + self._settings.stall_timeout
        said = False
        while not self._closing:
            if not said:
                with contextlib.suppress(zmq.Again):  # somebody hung up at once: why, is told below
                    control.send(self._hello)
                    said = True
            control.wait(_PING_SECONDS / 2)
            answer = control.read(self._vocab_size)
            if isinstance(answer, m.Welcome):
                return answer
            if answer is not None:
                reason = answer.reason if isinstance(answer, m.Rejected) else "no Welcome"
                lost = _Lost(
                    f"the receiver at {self.where} refuses: {printable(reason)}", _REJECTED_SECONDS
                )
                lost.refused = True
                raise lost
            not_yet = control.check_answering()
            if time.monotonic() > until:
                raise not_yet
            self._listener.tick(time.monotonic())
        raise _Lost("this side is closing")

    def _serve(
        self, control: ControlSocket, welcome: m.Welcome, hosts: Callable[[], Sequence[str]]
    ) -> None:
        while not self._outbox.empty():
            self._outbox.get()  # what was for the last conversation
        paths = Paths(self._target_of(control.address.host, welcome), hosts)
        target = self._measured(control, paths)
        self._paths, self._target = paths, target
        if not self._listener.connected(welcome):
            self._target = None
            raise _Twin(welcome.receiver)
        self.problem = None
        logger.info(
            "connected to the receiver at %s (%s, %s)",
            self.where,
            printable(welcome.engine),
            printable(welcome.model),
        )
        pinged = ticked = 0.0
        heard = time.monotonic()
        while not self._closing:
            control.wait(_PING_SECONDS / 2, self._wake_in)
            now = time.monotonic()
            with contextlib.suppress(OSError):
                self._wake_in.recv(4096)
            while not self._outbox.empty():
                control.send(self._outbox.get())
            if self._take(control):
                heard = now
            elif control.lost():
                raise _Lost("it closed the connection")
            if now - pinged > _PING_SECONDS:
                pinged = now
                control.send(m.Ping(time.monotonic_ns(), paths.used))
            if now - heard > self._settings.stall_timeout:
                raise _Lost(f"it has been silent for {now - heard:.1f} s")
            if now - ticked > _TICK_SECONDS:
                ticked = now
                self._target = paths.look(self._listener.idle()) or self._target
                self._listener.tick(now)

    def _measured(self, control: ControlSocket, paths: Paths) -> DataTarget:
        """Where blocks go at first; the receiver is kept company until that is known. Raises
        _Lost."""
        while (target := paths.first()) is None:
            if self._closing:
                raise _Lost("this side is closing")
            control.send(m.Ping(sent_ns=time.monotonic_ns()))
            control.wait(_PING_SECONDS / 2)
            while (message := control.read(self._vocab_size)) is not None:
                if isinstance(message, m.Rejected):
                    raise _Lost(printable(message.reason))
            if control.lost():
                raise _Lost("it closed the connection")
            self._listener.tick(time.monotonic())
        return target

    def _take(self, control: ControlSocket) -> int:
        """Hand on what has arrived, as much as the clock allows; how many messages."""
        for taken in range(_AT_ONCE):
            message = control.read(self._vocab_size)
            if message is None:
                return taken
            if isinstance(message, m.Rejected):
                raise _Lost(printable(message.reason))
            if isinstance(message, m.Welcome):
                raise m.WireError(m.E_PROTOCOL, "a second Welcome")
            try:
                self._listener.message(message, time.perf_counter())
            except Unusable as error:
                raise _Lost(str(error), _REJECTED_SECONDS) from None
        return _AT_ONCE

    def _target_of(self, host: str, welcome: m.Welcome) -> DataTarget:
        """Blocks go to the address of this connection, whatever the receiver says, unless another
        one of it proves that it is the same receiver's, and faster. Raises _Lost."""
        for endpoint in welcome.endpoints:
            if endpoint.transport == self._settings.transport:
                plain = self._both_plain(host, endpoint)
                at = m.Endpoint(endpoint.transport, host, endpoint.port, endpoint.nonce, plain)
                return DataTarget(at, welcome.receiver, welcome.ticket, self.number)
        offered = ", ".join(printable(endpoint.transport) for endpoint in welcome.endpoints)
        raise _Lost(
            f"the receiver offers no {self._settings.transport!r} transport (it has: {offered})",
            _REJECTED_SECONDS,
        )

    def _both_plain(self, host: str, endpoint: m.Endpoint) -> bool:
        """Whether both sides allow KV that is not encrypted."""
        ours = self._settings.plain_data
        if ours != endpoint.plain and not is_this_machine(host):
            logger.warning(
                "plain_data takes effect on both sides only: %s",
                "the receiver was started without --plain-data"
                if ours
                else "the receiver was started with it, here MAC_DECODE_PLAIN_DATA is not set",
            )
        return ours and endpoint.plain
