"""The ``zmq`` transport: DEALER to ROUTER over one TCP connection, bounded by credits.

ZeroMQ counts messages, not bytes, and queues without telling; so the receiver returns one CREDIT
for each frame that has landed, and a sender has at most WINDOW_BYTES and WINDOW_FRAMES on the way.

Credentials are ZeroMQ's own PLAIN handshake: the client's name, and a proof that it knows its
ticket's key, made for this listener (``Endpoint.nonce``). Whoever was never given a ticket gets no
message through, and ZeroMQ marks each message with the client whose connection it came on. What it
does not prove: that the receiver is the right one, which hears nothing but proofs for itself yet
gets the blocks; and that nobody listened, for a proof that was overheard on this network is good
until the listener ends. ``tcp`` proves both. Nothing is encrypted either, so between machines this
transport must be allowed on both sides (``Endpoint.plain``).

ZeroMQ bounds neither the number of connections in their handshake (5 s each) nor the parts of one
message, and one thread lands everybody's blocks: where strangers can connect, or clients that do
not trust each other, use ``tcp``.

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
from typing import Any, Final

import msgspec
import zmq
from zmq.utils.monitor import parse_monitor_message

from mlx_receiver.transports.landing import Lander, scatter
from mlx_receiver.transports.seal import bare_level_for, check_level
from mlx_receiver.transports.transport import BlockSink, Listener, Sender, TransportError
from mlx_receiver.wire.addresses import Address, announced, listening, spelled, try_each
from mlx_receiver.wire.frames import (
    HEADER_BYTES,
    MAX_SMALL_PAYLOAD,
    DataReply,
    Header,
    Kind,
    decode_reply,
    unpack,
    unpack_client,
)
from mlx_receiver.wire.keys import new_nonce, proof
from mlx_receiver.wire.messages import (
    E_CREDENTIALS,
    E_PROTOCOL,
    DataTicket,
    Endpoint,
    WireError,
)
from mlx_receiver.wire.seldom import Seldom

logger = logging.getLogger(__name__)

_CLOSED: Final = "data connection from %s closed: %s"

#: What one sender may have on the way: enough for a 10 Gbit link and a receiver's pause of 20 ms.
WINDOW_BYTES: Final = 32 << 20
WINDOW_FRAMES: Final = 64

#: Send buffers are multiples of this many bytes.
_ROUND: Final = 256 << 10

#: Largest part of a message: what a peer that has not proved itself yet may have the receiver
#: allocate. Smaller parts would cost time.
_PART_BYTES: Final = 4 << 20

#: Replies read at most by one look for them: a peer that never stops holds nobody up.
_MAX_TAKEN: Final = 4096

#: How long, in seconds, the thread waits after a fault of its own.
_PAUSE: Final = 0.1

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
    """See ``transport.Sender``. ``replies`` may be called while ``send`` waits."""

    def __init__(self, endpoint: Endpoint, ticket: DataTicket, timeout: float) -> None:
        self._peer = spelled(endpoint.host, endpoint.port)
        self._timeout = timeout
        self._lock = threading.RLock()
        self._inbox: deque[DataReply] = deque()
        #: Payload bytes and buffer of each frame whose credit has not come.
        self._on_the_way: deque[tuple[int, memoryview | None]] = deque()
        self._free: list[memoryview] = []
        self._failure = ""

        def attempt(address: Address, until: float) -> None:
            bare_level_for(address.host, endpoint)
            try:
                self._connect(address, endpoint.nonce, ticket, until)
            except BaseException:
                self.close()
                raise

        try:
            try_each(endpoint.host, endpoint.port, timeout, attempt)
        except TransportError:
            raise
        except OSError as error:
            raise TransportError(f"cannot reach {self._peer}: {error}") from None

    def _connect(self, address: Address, nonce: bytes, ticket: DataTicket, until: float) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._events = self._socket.get_monitor_socket(int(_LOST | zmq.Event.HANDSHAKE_SUCCEEDED))
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._events, zmq.POLLIN)
        milliseconds = int(1000 * self._timeout)
        set_option = self._socket.setsockopt
        set_option(zmq.LINGER, 0)
        set_option(zmq.IPV6, 1)
        set_option(zmq.SNDHWM, 0)  # credits bound it
        set_option(zmq.RECONNECT_IVL, -1)  # a lost connection has lost frames
        set_option(zmq.MAXMSGSIZE, MAX_SMALL_PAYLOAD)
        set_option(zmq.HEARTBEAT_IVL, max(100, milliseconds // 2))
        set_option(zmq.HEARTBEAT_TIMEOUT, max(200, milliseconds))
        set_option(zmq.PLAIN_USERNAME, ticket.client.encode())
        set_option(zmq.PLAIN_PASSWORD, _password(ticket.key, nonce))
        try:
            self._socket.connect(f"tcp://{address.text}")
        except zmq.ZMQError as error:
            raise TransportError(f"cannot reach {address.text}: {error}") from None
        while (event := self._event(until)) != zmq.Event.HANDSHAKE_SUCCEEDED:
            if event is None:
                raise TransportError(f"{address.text} did not answer in time")
            if event == zmq.Event.HANDSHAKE_FAILED_AUTH:
                raise TransportError(f"{address.text} refused the credentials")
            raise TransportError(f"cannot reach {address.text}")

    def _event(self, until: float) -> int | None:
        """The next event of the connection, None when none came until then."""
        if not self._events.poll(max(0, int(1000 * (until - time.monotonic())))):
            return None
        return int(parse_monitor_message(self._events.recv_multipart())["event"])

    def send(self, header: Header, payload: Sequence[memoryview] = ()) -> None:
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
                for start in range(0, count, _PART_BYTES):
                    end = min(start + _PART_BYTES, count)
                    more = zmq.SNDMORE if end < count else 0
                    self._socket.send(buffer[start:end], more, copy=False)
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
        for _ in range(_MAX_TAKEN if self._socket in ready else 0):
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
        with self._lock:
            if not self._socket.closed:
                with contextlib.suppress(zmq.ZMQError):
                    self._socket.disable_monitor()
                self._events.close(linger=0)
                self._socket.close(linger=0)
                self._context.term()


class ZmqListener:
    """See ``transport.Listener``. One ROUTER, one thread: reads frames, lands them, returns
    credits."""

    def __init__(self, host: str, port: int, sink: BlockSink, plain: bool = False) -> None:
        self._sink = sink
        self._host = host
        self._plain = plain
        self._nonce = new_nonce()
        self._lander = Lander(sink)
        self._refused: dict[bytes, None] = {}  # the oldest first
        self._complaints = Seldom(logger)
        self._outbox: deque[tuple[bytes, DataReply]] = deque()
        self._closing = False
        servers = listening(host, port)
        self._port: int = servers[0].getsockname()[1]
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_write.setblocking(False)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._doorman = self._context.socket(zmq.REP)
        self._doorman.bind("inproc://zeromq.zap.01")
        self._socket = self._context.socket(zmq.ROUTER)
        set_option = self._socket.setsockopt
        set_option(zmq.LINGER, 0)
        set_option(zmq.ROUTER_MANDATORY, 1)
        set_option(zmq.PLAIN_SERVER, 1)
        set_option(zmq.ZAP_DOMAIN, _DOMAIN)
        set_option(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
        set_option(zmq.MAXMSGSIZE, _PART_BYTES)
        # Twice what a sender that counts its credits can have on the way.
        set_option(zmq.RCVHWM, 2 * WINDOW_FRAMES)
        for server in servers:
            # ZeroMQ listens on our sockets: it would take one address of a name.
            server.setblocking(False)
            set_option(zmq.USE_FD, server.detach())
            self._socket.bind(f"tcp://127.0.0.1:{self._port}")
        self._thread = threading.Thread(target=self._run, name="data-zmq", daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> Endpoint:
        """Where it listens; an unspecified host is announced as the control channel's."""
        return Endpoint("zmq", announced(self._host), self._port, self._nonce, self._plain)

    def close(self) -> None:
        self._closing = True
        self._wake()
        self._thread.join(timeout=5.0)
        self._wake_write.close()

    def _wake(self) -> None:
        # Full: a wake-up is under way already. Closed: nobody is there any more.
        with contextlib.suppress(OSError):
            self._wake_write.send(b"!")

    def _run(self) -> None:
        poller = zmq.Poller()
        for source in (self._socket, self._doorman, self._wake_read):
            poller.register(source, zmq.POLLIN)
        while not self._closing:
            try:
                self._turn(dict(poller.poll()))
            except Exception:
                # Whatever it is: without this thread no block comes in any more.
                logger.exception("the zmq data channel had to pause")
                time.sleep(_PAUSE)
        self._socket.close(linger=0)
        self._doorman.close(linger=0)
        self._context.term()
        self._wake_read.close()

    def _turn(self, ready: dict[Any, int]) -> None:
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

    def _admit(self, request: list[bytes]) -> None:
        """Answer a handshake (ZeroMQ RFC 27)."""
        version, number, _, peer, _, mechanism, *credentials = request
        status, text, client = b"400", b"no ticket", b""
        try:
            if mechanism != b"PLAIN" or len(credentials) != 2:
                raise WireError(E_CREDENTIALS, "it shows no ticket")
            name, given = credentials
            key = self._sink.data_key(name.decode())
            if not hmac.compare_digest(given, _password(key, self._nonce)):
                raise WireError(E_CREDENTIALS, "it does not know the ticket's key")
            if not self._plain:
                check_level("clear", peer.decode(), plain=False)
            status, text, client = b"200", b"OK", name
        except Exception as error:
            self._complaints.warning(_CLOSED, peer.decode(errors="replace"), error)
        # Always: without an answer the next handshake could not be asked about.
        self._doorman.send_multipart([version, number, status, text, client, b""])

    def _receive(self) -> None:
        """Land one message, so that handshakes and replies get their turn in between."""
        peer, *frames = self._socket.recv_multipart(copy=False)
        identity, client = peer.bytes, "a client"
        if identity in self._refused:
            return
        try:
            # Of whoever proved itself on this connection; the identity is what a peer says it is.
            client = str(frames[0].get("User-Id"))
            self._take(identity, client, [frame.buffer for frame in frames])
        except Exception as error:
            if not isinstance(error, WireError | TransportError):
                logger.exception("a zmq data message of client %s failed", client)
            # The connection cannot be closed from here; it gets no credits any more.
            self._complaints.warning(_CLOSED, f"client {client}", error)
            self._refused[identity] = None
            if len(self._refused) > _MAX_REFUSED:
                del self._refused[next(iter(self._refused))]
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
        elif header.kind is Kind.BLOCK:
            self._lander.land(client, header, lambda _, buffers, __: scatter(payload, buffers))
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

    def listen(self, host: str, port: int, sink: BlockSink, plain: bool = False) -> Listener:
        return ZmqListener(host, port, sink, plain)

    def connect(self, endpoint: Endpoint, ticket: DataTicket, timeout: float) -> Sender:
        return ZmqSender(endpoint, ticket, timeout)
