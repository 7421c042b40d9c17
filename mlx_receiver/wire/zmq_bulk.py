"""The ``zmq`` transport: DEALER to ROUTER over one TCP connection, bounded by credits.

ZeroMQ counts messages, not bytes, and queues without telling; so the receiver returns one CREDIT
for each frame that has landed, and a sender has at most WINDOW_BYTES and WINDOW_FRAMES on the way.

Credentials are ZeroMQ's own PLAIN handshake: the client's name, and a proof that it knows its
ticket's key, made for this listener (``Endpoint.nonce``). Whoever was never given a ticket gets no
message through, and ZeroMQ marks each message with the client whose connection it came on. What it
does not prove: that the receiver is the right one, which hears nothing but proofs for itself yet
gets the blocks; and that nobody listened, for a proof that was overheard on this network is good
until the listener ends. ``tcp`` proves both.

Messages: a frame is ``[header, payload part, ...]`` one way, ``[header]`` (CREDIT) or
``[header, DataReply]`` (REPLY) the other. ``[text]`` from the receiver is its farewell: the
connection is refused from now on, and why.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Final

import msgspec
import zmq
from zmq.utils.monitor import parse_monitor_message

from mlx_receiver.wire.frames import (
    HEADER_BYTES,
    MAX_PAYLOAD,
    DataReply,
    Header,
    Kind,
    decode_reply,
    unpack,
    unpack_client,
)
from mlx_receiver.wire.keys import new_nonce, proof
from mlx_receiver.wire.landing import Lander, scatter
from mlx_receiver.wire.messages import (
    E_CREDENTIALS,
    E_PROTOCOL,
    DataTicket,
    Endpoint,
    WireError,
)
from mlx_receiver.wire.transport import BlockSink, Listener, Sender, TransportError

logger = logging.getLogger(__name__)

#: What one sender may have on the way: enough for a 10 Gbit link and a receiver's pause of 20 ms.
WINDOW_BYTES: Final = 32 << 20
WINDOW_FRAMES: Final = 64

#: Send buffers are multiples of this many bytes.
_ROUND: Final = 256 << 10

_DOMAIN: Final = b"mac-decode"
_HANDSHAKE_MS: Final = 5000
_MAX_REFUSED: Final = 4096
_LOST: Final = (
    zmq.Event.DISCONNECTED
    | zmq.Event.CLOSED
    | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
    | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
    | zmq.Event.HANDSHAKE_FAILED_AUTH
    | zmq.Event.MONITOR_STOPPED
)


class ZmqSender:
    """A vLLM worker's bulk connection. ``replies`` may be called while ``send`` waits."""

    def __init__(self, endpoint: Endpoint, ticket: DataTicket, timeout: float) -> None:
        self._peer = f"{endpoint.host}:{endpoint.port}"
        self._timeout = timeout
        self._lock = threading.RLock()
        self._inbox: deque[DataReply] = deque()
        #: Payload bytes and buffer of each frame whose credit has not come.
        self._on_the_way: deque[tuple[int, memoryview | None]] = deque()
        self._free: list[memoryview] = []
        self._failure = ""
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._events = self._socket.get_monitor_socket(int(_LOST | zmq.Event.HANDSHAKE_SUCCEEDED))
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._events, zmq.POLLIN)
        try:
            self._connect(endpoint, ticket)
        except (zmq.ZMQError, ValueError) as error:
            self.close()
            raise TransportError(f"cannot reach {self._peer}: {error}") from None
        except TransportError:
            self.close()
            raise

    def _connect(self, endpoint: Endpoint, ticket: DataTicket) -> None:
        milliseconds = int(1000 * self._timeout)
        set_option = self._socket.setsockopt
        set_option(zmq.LINGER, 0)
        set_option(zmq.IPV6, 1)
        set_option(zmq.SNDHWM, 0)  # credits bound it
        set_option(zmq.RECONNECT_IVL, -1)  # a lost connection has lost frames
        set_option(zmq.MAXMSGSIZE, HEADER_BYTES + MAX_PAYLOAD)
        set_option(zmq.HEARTBEAT_IVL, max(100, milliseconds // 2))
        set_option(zmq.HEARTBEAT_TIMEOUT, max(200, milliseconds))
        set_option(zmq.PLAIN_USERNAME, ticket.client.encode())
        set_option(zmq.PLAIN_PASSWORD, _password(ticket.key, endpoint.nonce))
        host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
        self._socket.connect(f"tcp://{host}:{endpoint.port}")
        until = time.monotonic() + self._timeout
        while (event := self._event(until)) != zmq.Event.HANDSHAKE_SUCCEEDED:
            if event is None:
                raise TransportError(f"{self._peer} did not answer within {self._timeout:g} s")
            if event == zmq.Event.HANDSHAKE_FAILED_AUTH:
                raise TransportError(f"{self._peer} refused the credentials")
            raise TransportError(f"cannot reach {self._peer}")

    def _event(self, until: float) -> int | None:
        """The next event of the connection, None when none came until then."""
        if not self._events.poll(max(0, int(1000 * (until - time.monotonic())))):
            return None
        return int(parse_monitor_message(self._events.recv_multipart())["event"])

    def send(self, header: Header, payload: Sequence[memoryview] = ()) -> None:
        """See ``transport.Sender.send``."""
        with self._lock:
            self._check()
            count = sum(part.nbytes for part in payload)
            self._await_window(count)
            buffer = None
            if count:
                # The payload is the caller's again at once, and the copy leaves in one piece:
                # ZeroMQ spends as much on a small part as on a large one.
                buffer = self._buffer(count)
                scatter(payload, [buffer[:count]])
            self._on_the_way.append((count, buffer))
            self._socket.send(header.pack(), 0 if buffer is None else zmq.SNDMORE)
            if buffer is not None:
                self._socket.send(buffer[:count], copy=False)
            self._take(0)

    def _buffer(self, count: int) -> memoryview:
        """Memory for a payload, used again once the credit for its frame has come."""
        for index, buffer in enumerate(self._free):
            if buffer.nbytes >= count:
                return self._free.pop(index)
        self._free.clear()  # too small for what is sent now
        return memoryview(bytearray(-(-count // _ROUND) * _ROUND))

    def _await_window(self, count: int) -> None:
        """Wait for credits until a frame of that size may follow; one frame always may."""
        until = time.monotonic() + self._timeout
        while self._on_the_way and (
            sum(sent for sent, _ in self._on_the_way) + count > WINDOW_BYTES
            or len(self._on_the_way) >= WINDOW_FRAMES
        ):
            if self._take(until - time.monotonic()):
                until = time.monotonic() + self._timeout
            elif time.monotonic() >= until:
                self._stalled()

    def _stalled(self) -> None:
        self._fail(f"{self._peer} has taken nothing for too long")

    def _take(self, seconds: float) -> int:
        """Read what the receiver sent, after waiting at most ``seconds`` for it; counts credits."""
        credits = 0
        ready = dict(self._poller.poll(max(0, int(1000 * seconds))))
        while self._socket in ready:
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            if len(parts) == 1 and len(parts[0]) != HEADER_BYTES:
                self._fail(f"{self._peer} refused: {parts[0].decode(errors='replace')}")
            if unpack(parts[0]).kind is Kind.CREDIT and self._on_the_way:
                _, buffer = self._on_the_way.popleft()
                if buffer is not None:
                    self._free.append(buffer)
                credits += 1
            elif len(parts) == 2:
                self._inbox.append(decode_reply(parts[1]))
        while self._events in ready and (event := self._event(0.0)) is not None:
            if event & _LOST:
                self._fail(f"the connection to {self._peer} broke")
        return credits

    def _fail(self, reason: str) -> None:
        self._failure = reason
        self.close()
        raise TransportError(reason)

    def _check(self) -> None:
        if self._socket.closed:
            raise TransportError(self._failure or f"the connection to {self._peer} is closed")

    def replies(self) -> list[DataReply]:
        """See ``transport.Sender.replies``."""
        # A send in progress reads what arrives by itself.
        if self._lock.acquire(blocking=False):
            try:
                self._check()
                self._take(0)
            finally:
                self._lock.release()
        return [self._inbox.popleft() for _ in range(len(self._inbox))]

    def flush(self) -> None:
        """Wait until everything sent has landed. Raises TransportError as ``send`` does."""
        with self._lock:
            until = time.monotonic() + self._timeout
            while self._on_the_way:
                if self._take(0.1):
                    until = time.monotonic() + self._timeout
                elif time.monotonic() >= until:
                    self._stalled()

    def close(self) -> None:
        """See ``transport.Sender.close``."""
        with self._lock:
            if not self._socket.closed:
                with contextlib.suppress(zmq.ZMQError):
                    self._socket.disable_monitor()
                self._events.close(linger=0)
                self._socket.close(linger=0)
                self._context.term()


class ZmqListener:
    """One ROUTER, one thread: reads frames, lands them, returns credits."""

    def __init__(self, host: str, port: int, sink: BlockSink) -> None:
        self._sink = sink
        self._host = host
        self._nonce = new_nonce()
        self._lander = Lander(sink)
        self._refused: deque[bytes] = deque(maxlen=_MAX_REFUSED)
        self._outbox: deque[tuple[bytes, DataReply]] = deque()
        self._closing = False
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_write.setblocking(False)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._doorman = self._context.socket(zmq.REP)
        self._doorman.bind("inproc://zeromq.zap.01")
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.IPV6, int(":" in host))
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.PLAIN_SERVER, 1)
        self._socket.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN)
        self._socket.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_PAYLOAD)
        # Twice what a sender that counts its credits can have on the way.
        self._socket.setsockopt(zmq.RCVHWM, 2 * WINDOW_FRAMES)
        try:
            self._port = self._bind(host, port)
        except zmq.ZMQError as error:
            self._close()
            raise OSError(error.errno, str(error)) from None
        self._thread = threading.Thread(target=self._run, name="bulk-zmq", daemon=True)
        self._thread.start()

    def _bind(self, host: str, port: int) -> int:
        address = "tcp://" + (f"[{host}]" if ":" in host else host or "*")
        if port:
            self._socket.bind(f"{address}:{port}")
            return port
        return self._socket.bind_to_random_port(address)

    @property
    def endpoint(self) -> Endpoint:
        """Where it listens; an unspecified host is announced as the control channel's."""
        host = "" if self._host in ("", "0.0.0.0", "::") else self._host
        return Endpoint(transport="zmq", host=host, port=self._port, nonce=self._nonce)

    def close(self) -> None:
        """See ``transport.Listener.close``."""
        self._closing = True
        self._wake()
        self._thread.join(timeout=5.0)
        self._wake_write.close()

    def _close(self) -> None:
        self._socket.close(linger=0)
        self._doorman.close(linger=0)
        self._context.term()

    def _wake(self) -> None:
        # Full: a wake-up is under way already. Closed: nobody is there any more.
        with contextlib.suppress(OSError):
            self._wake_write.send(b"!")

    def _run(self) -> None:
        poller = zmq.Poller()
        for source in (self._socket, self._doorman, self._wake_read):
            poller.register(source, zmq.POLLIN)
        try:
            while not self._closing:
                ready = dict(poller.poll())
                if self._wake_read.fileno() in ready:
                    self._wake_read.recv(4096)
                if self._doorman in ready:
                    self._admit(self._doorman.recv_multipart())
                while self._outbox:
                    peer, message = self._outbox.popleft()
                    body = msgspec.msgpack.encode(message)
                    header = Header(Kind.REPLY, message.session, len(body))
                    self._post(peer, header.pack(), body)
                if self._socket in ready:
                    self._receive()
        except Exception:
            logger.exception("the zmq bulk channel failed")
        finally:
            self._close()
            self._wake_read.close()

    def _admit(self, request: list[bytes]) -> None:
        """Answer a handshake (ZeroMQ RFC 27)."""
        version, number, _, peer, _, mechanism, *credentials = request
        status, text, client = b"400", b"no ticket", b""
        try:
            if mechanism != b"PLAIN" or len(credentials) != 2:
                raise WireError(E_CREDENTIALS, "it shows no ticket")
            client, given = credentials
            key = self._sink.data_key(client.decode())
            if not hmac.compare_digest(given, _password(key, self._nonce)):
                raise WireError(E_CREDENTIALS, "it does not know the ticket's key")
            status, text = b"200", b"OK"
        except (WireError, UnicodeDecodeError) as error:
            logger.warning(
                "bulk connection from %s closed: %s", peer.decode(errors="replace"), error
            )
        self._doorman.send_multipart([version, number, status, text, client, b""])

    def _receive(self) -> None:
        """Land one message, so that handshakes and replies get their turn in between."""
        peer, *frames = self._socket.recv_multipart(copy=False)
        identity = peer.bytes
        if identity in self._refused:
            return
        try:
            # Of whoever proved itself on this connection; the identity is what a peer says it is.
            client = str(frames[0].get("User-Id")) if frames else ""
            self._take(identity, client, [frame.buffer for frame in frames])
        except (WireError, TransportError) as error:
            # The connection cannot be closed from here; it gets no credits any more.
            logger.warning("bulk connection closed: %s", error)
            self._refused.append(identity)
            text = str(error).encode()
            self._post(identity, text if len(text) != HEADER_BYTES else text + b".")

    def _take(self, peer: bytes, client: str, parts: list[memoryview]) -> None:
        if not parts or parts[0].nbytes != HEADER_BYTES:
            raise WireError(E_PROTOCOL, "a message without a header")
        header, payload = unpack_client(parts[0]), parts[1:]
        if sum(part.nbytes for part in payload) != header.payload_bytes:
            raise WireError(E_PROTOCOL, f"{header.describe()}: the payload has another size")
        if header.kind is Kind.ATTACH:
            self._sink.attach(client, header.session, lambda message: self._reply(peer, message))
        else:
            self._lander.land(client, header, lambda _, buffers: scatter(payload, buffers))
        self._post(peer, Header(Kind.CREDIT, header.session, 0).pack())

    def _reply(self, peer: bytes, message: DataReply) -> None:
        """From any thread."""
        self._outbox.append((peer, message))
        self._wake()

    def _post(self, *parts: bytes) -> None:
        try:
            self._socket.send_multipart(parts, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (errno.EHOSTUNREACH, zmq.EAGAIN):
                raise


def _password(key: bytes, nonce: bytes) -> bytes:
    """What a client shows to the listener of that nonce; PLAIN's is a text of 255 bytes at most."""
    return proof(key, "client", nonce).hex().encode()


class ZmqTransport:
    """See ``transport.Transport``."""

    name = "zmq"

    def listen(self, host: str, port: int, sink: BlockSink) -> Listener:
        """See ``transport.Transport.listen``."""
        return ZmqListener(host, port, sink)

    def connect(self, endpoint: Endpoint, ticket: DataTicket, timeout: float) -> Sender:
        """See ``transport.Transport.connect``."""
        return ZmqSender(endpoint, ticket, timeout)
