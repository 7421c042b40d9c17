"""The control connection to the receiver: one background thread in vLLM's engine process.

Connects whenever a receiver is there, says Hello, keeps the connection alive with Pings, and
hands every other message to a listener. A receiver that appears later, restarts or moves (the
host name is resolved again at every attempt) is found without restarting vLLM.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import uuid
from typing import Protocol

import zmq
from vllm.logger import init_logger

from mlx_receiver.wire import messages as m
from mlx_receiver.wire.signature import ModelSignature
from vllm_mac_decode.metadata import BulkTarget
from vllm_mac_decode.settings import Settings

logger = init_logger("vllm.mac_decode.link")

_PING_SECONDS = 0.25
_RETRY_SECONDS = (0.5, 1.0, 2.0, 5.0)
_REJECTED_SECONDS = 10.0


class LinkListener(Protocol):
    """Called from the link's thread."""

    def connected(self, welcome: m.Welcome) -> None:
        """The receiver accepts sessions."""

    def disconnected(self, reason: str) -> None:
        """Every session is lost."""

    def message(self, message: m.ReceiverMessage, arrived: float) -> None:
        """Anything else that the receiver says, and when it came (``time.perf_counter()``)."""

    def tick(self, now: float) -> None:
        """A few times a second; ``now`` is ``time.monotonic()``."""


class Link:
    """Owns the socket. ``send`` may be called from any thread."""

    def __init__(
        self,
        settings: Settings,
        signature: ModelSignature,
        kv_dtype: str,
        engine: str,
        listener: LinkListener,
    ) -> None:
        self._settings = settings
        self._client = uuid.uuid4().hex
        self._hello = m.encode(
            m.Hello(
                protocol=m.PROTOCOL_VERSION,
                signature=signature,
                kv_dtype=kv_dtype,
                token=settings.token,
                client=self._client,
                engine=engine,
            )
        )
        self._listener = listener
        self._outbox: queue.SimpleQueue[m.ClientMessage] = queue.SimpleQueue()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._wake_address = f"inproc://{self._client}"
        self._wake_in = self._context.socket(zmq.PAIR)
        self._wake_in.bind(self._wake_address)
        self._wake_out = self._context.socket(zmq.PAIR)
        self._wake_out.connect(self._wake_address)
        self._wake_lock = threading.Lock()
        self._closing = False
        self._complaint = ""
        self._welcome: m.Welcome | None = None
        self._thread = threading.Thread(target=self._run, name="mac-decode-link", daemon=True)
        self._thread.start()

    @property
    def target(self) -> BulkTarget | None:
        """Where workers send blocks; None while no receiver is connected."""
        welcome = self._welcome
        if welcome is None:
            return None
        for endpoint in welcome.endpoints:
            if endpoint.transport == self._settings.transport:
                host = endpoint.host or self._settings.address()[0]
                return BulkTarget(
                    m.Endpoint(endpoint.transport, host, endpoint.port),
                    welcome.receiver,
                    self._client,
                )
        return None

    @property
    def welcome(self) -> m.Welcome | None:
        """What the connected receiver said of itself; None while there is none."""
        return self._welcome

    def send(self, message: m.ClientMessage) -> None:
        """Queue a message; dropped when no receiver is connected (its sessions are lost then)."""
        if self._welcome is None:
            return
        self._outbox.put(message)
        self._wake()

    def close(self) -> None:
        """Stop the thread and free the sockets."""
        self._closing = True
        self._wake()
        self._thread.join(timeout=2.0)
        self._context.destroy(linger=0)

    def _wake(self) -> None:
        with self._wake_lock, contextlib.suppress(zmq.ZMQError):
            self._wake_out.send(b"", zmq.NOBLOCK)

    def _run(self) -> None:
        attempt = 0
        while not self._closing:
            began = time.monotonic()
            try:
                pause = self._converse()
            except Exception:
                if self._closing:
                    return  # ``close`` waited for a while and then took the sockets
                logger.exception("the link to the receiver failed; it will be tried again")
                pause = _RETRY_SECONDS[-1]
            if self._welcome is not None:
                self._lost("the link failed")
            if time.monotonic() - began > 10:
                attempt = 0
            pause = pause or _RETRY_SECONDS[min(attempt, len(_RETRY_SECONDS) - 1)]
            attempt += 1
            self._sleep(pause)

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._closing and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))

    def _converse(self) -> float:
        """One connection, from Hello to its end. Returns seconds to wait, 0 for the usual."""
        host, port = self._settings.address()
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, 1000)
        socket.setsockopt(zmq.RCVHWM, 10000)
        socket.setsockopt(zmq.IPV6, 1)
        socket.setsockopt(zmq.MAXMSGSIZE, m.MAX_MESSAGE_BYTES)
        # ZeroMQ would reconnect silently, to a receiver that knows nothing of us.
        broken = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        poller = zmq.Poller()
        for readable in (socket, broken):
            poller.register(readable, zmq.POLLIN)
        try:
            try:
                socket.connect(f"tcp://{_bracketed(host)}:{port}")
            except zmq.ZMQError as error:
                self._complain(f"cannot use {self._settings.receiver}: {error}")
                return 0
            socket.send(self._hello)
            if socket not in dict(poller.poll(int(self._settings.stall_timeout * 1000))):
                self._complain(f"no receiver answers at {self._settings.receiver}")
                return 0
            answer = m.decode_receiver(socket.recv())
            if isinstance(answer, m.Rejected):
                self._complain(
                    f"the receiver at {self._settings.receiver} refuses: {answer.reason}"
                )
                return _REJECTED_SECONDS
            if not isinstance(answer, m.Welcome):
                self._complain(f"{self._settings.receiver} does not speak this protocol")
                return _REJECTED_SECONDS
            return self._serve(socket, broken, answer)
        except m.WireError as error:
            self._complain(f"{self._settings.receiver}: {error.reason}")
            return _REJECTED_SECONDS
        finally:
            socket.disable_monitor()
            socket.close()

    def _serve(
        self, socket: zmq.Socket[bytes], broken: zmq.Socket[bytes], welcome: m.Welcome
    ) -> float:
        self._drain_outbox()
        self._welcome = welcome
        self._complaint = ""
        if self.target is None:
            offered = ", ".join(e.transport for e in welcome.endpoints)
            self._welcome = None
            self._complain(
                f"the receiver offers no {self._settings.transport!r} transport (it has: {offered})"
            )
            return _REJECTED_SECONDS
        logger.info(
            "connected to the receiver at %s (%s, %s)",
            self._settings.receiver,
            welcome.engine,
            welcome.model,
        )
        self._listener.connected(welcome)
        poller = zmq.Poller()
        for readable in (socket, self._wake_in, broken):
            poller.register(readable, zmq.POLLIN)
        pinged = 0.0
        heard = time.monotonic()
        while not self._closing:
            events = dict(poller.poll(int(_PING_SECONDS * 1000 / 2)))
            now = time.monotonic()
            if self._wake_in in events:
                with contextlib.suppress(zmq.Again):
                    while True:
                        self._wake_in.recv(zmq.NOBLOCK)
            while not self._outbox.empty():
                socket.send(m.encode(self._outbox.get()), zmq.NOBLOCK)
            if socket in events:
                heard = now
                with contextlib.suppress(zmq.Again):
                    while True:
                        packed = socket.recv(zmq.NOBLOCK)
                        arrived = time.perf_counter()
                        message = m.decode_receiver(packed)
                        if isinstance(message, m.Rejected):
                            self._lost(message.reason)
                            return 0
                        self._listener.message(message, arrived)
            if broken in events:
                self._lost("it closed the connection")
                return 0
            if now - pinged > _PING_SECONDS:
                pinged = now
                socket.send(m.encode(m.Ping(sent_ns=time.monotonic_ns())), zmq.NOBLOCK)
            if now - heard > self._settings.stall_timeout:
                self._lost(f"it has been silent for {now - heard:.1f} s")
                return 0
            self._listener.tick(now)
        return 0

    def _drain_outbox(self) -> None:
        while not self._outbox.empty():
            self._outbox.get()

    def _lost(self, reason: str) -> None:
        self._welcome = None
        if not self._closing:
            logger.warning(
                "lost the receiver at %s: %s; responses go on locally",
                self._settings.receiver,
                reason,
            )
        self._listener.disconnected(reason)

    def _complain(self, complaint: str) -> None:
        """Log a reason for not being connected once, not at every attempt."""
        if complaint != self._complaint:
            self._complaint = complaint
            logger.warning("decoding locally: %s", complaint)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
