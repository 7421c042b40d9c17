"""The ``tcp`` transport: plain blocking sockets, scatter/gather, no copies.

Sending is ``sendmsg([header, payload])``; receiving is ``recvmsg_into`` straight into the
receiver's cache memory with MSG_WAITALL. TCP's own window is the flow control: the receiver
reads only into memory that a session has reserved, so a slow receiver makes ``send`` block.

Timeouts are the kernel's SO_SNDTIMEO and SO_RCVTIMEO: Python's ``settimeout`` would make the
descriptor non-blocking, on which MSG_WAITALL has no effect.

A transport that moves payloads by other means keeps this connection for everything else: it
gives ``TcpListener`` a ``Carrier`` (see ``nixl_bulk``).
"""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import msgspec

from mlx_receiver.wire.frames import (
    HEADER_BYTES,
    MAX_SMALL_PAYLOAD,
    DataHello,
    DataReply,
    Header,
    Kind,
    decode_reply,
    hello_decoder,
    unpack,
    unpack_client,
)
from mlx_receiver.wire.landing import Lander
from mlx_receiver.wire.messages import E_CREDENTIALS, E_PROTOCOL, Endpoint, WireError
from mlx_receiver.wire.transport import BlockSink, Listener, Sender, TransportError

logger = logging.getLogger(__name__)

#: Bytes that must have come before Linux wakes a thread that reads a payload. Woken for every
#: packet, it would spend as much time on waking up as on copying.
_WAKE_BYTES: Final = 256 << 10 if sys.platform == "linux" else 0

#: A peer that takes less than this within the connection's timeout stands still: the two kernels'
#: buffers alone take some, a little at a time.
_STANDSTILL_BYTES: Final = 1 << 20

_HELLO_SECONDS: Final = 5.0
_REPLY_SECONDS: Final = 1.0

#: Sessions of a connection that hear of its end: more than can be open at once.
_MAX_ATTACHED: Final = 1024

#: A peer whose machine vanished is noticed after about 25 s of silence.
_KEEPALIVE: Final = {"TCP_KEEPIDLE": 10, "TCP_KEEPALIVE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}


def tune(sock: socket.socket) -> None:
    """The options of a bulk connection, on either side."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        option = getattr(socket, name, None)
        if option is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
    if sys.platform == "linux":
        # bbr, some systems' default, paces itself to half of what a cable between two machines
        # carries. reno needs no more than its tiny bandwidth-delay product, and any user may
        # choose it.
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")


def _set_timeout(sock: socket.socket, option: int, seconds: float) -> None:
    sock.setsockopt(
        socket.SOL_SOCKET, option, struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
    )


def _recv_into(sock: socket.socket, buffers: Sequence[memoryview]) -> bool:
    """Fill the buffers. False when the peer closed before the first byte.

    Raises TransportError when the connection breaks in between.
    """
    todo = [buffer for buffer in buffers if buffer.nbytes]
    started = False
    while todo:
        try:
            count = sock.recvmsg_into(todo, 0, socket.MSG_WAITALL)[0]
        except BlockingIOError:
            raise TransportError("the sender went silent inside a frame") from None
        except OSError as error:
            raise TransportError(f"the connection broke: {error}") from None
        if count == 0:
            if started:
                raise TransportError("the connection closed inside a frame")
            return False
        started = True
        _advance(todo, count)
    return True


def _advance(todo: list[memoryview], count: int) -> None:
    """Drop the first ``count`` bytes of the buffers."""
    while todo and count >= todo[0].nbytes:
        count -= todo.pop(0).nbytes
    if count:
        todo[0] = todo[0][count:]


def _recv_payload(sock: socket.socket, buffers: Sequence[memoryview]) -> None:
    """Fill the buffers with a payload, waking up as seldom as that allows."""
    early = sum(buffer.nbytes for buffer in buffers) - _WAKE_BYTES
    if not _WAKE_BYTES or early < _WAKE_BYTES:
        _recv_rest(sock, buffers)
        return
    first, last = [], []
    for buffer in buffers:
        cut = min(max(early, 0), buffer.nbytes)
        first.append(buffer[:cut])
        last.append(buffer[cut:])
        early -= buffer.nbytes
    # While ``first`` is read, at least _WAKE_BYTES more of this payload are still to come: the
    # wait for them always ends.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, _WAKE_BYTES)
    _recv_rest(sock, first)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
    _recv_rest(sock, last)


def _recv_rest(sock: socket.socket, buffers: Sequence[memoryview]) -> None:
    """Fill the buffers with what follows a header."""
    if not _recv_into(sock, buffers) and any(buffer.nbytes for buffer in buffers):
        raise TransportError("the connection closed inside a frame")


class TcpSender:
    """A vLLM worker's bulk connection."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self._sock: socket.socket | None = sock
        self._inbox = bytearray()
        self.peer = peer

    def send(self, header: Header, payload: Sequence[memoryview] = ()) -> None:
        """See ``transport.Sender.send``."""
        sock = self._open()
        todo = [memoryview(header.pack()), *payload]
        try:
            while todo:
                count = sock.sendmsg(todo)
                _advance(todo, count)
                # The kernel returns before all is sent only when the timeout is over.
                if todo and count < _STANDSTILL_BYTES:
                    raise BlockingIOError
        except BlockingIOError:
            self.close()
            raise TransportError(f"{self.peer} has read nothing for too long") from None
        except OSError as error:
            self.close()
            raise TransportError(f"the connection to {self.peer} broke: {error}") from None

    def replies(self) -> list[DataReply]:
        """See ``transport.Sender.replies``."""
        return [decode_reply(body) for _, body in self.frames()]

    def frames(self) -> list[tuple[Header, bytes]]:
        """Frames that have arrived since the last call, with their payloads; never blocks."""
        sock = self._open()
        while True:
            try:
                data = sock.recv(MAX_SMALL_PAYLOAD, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError as error:
                self.close()
                raise TransportError(f"the connection to {self.peer} broke: {error}") from None
            if not data:
                self.close()
                raise TransportError(f"{self.peer} closed the connection")
            self._inbox += data
        found = []
        while len(self._inbox) >= HEADER_BYTES:
            header = unpack(self._inbox[:HEADER_BYTES])
            end = HEADER_BYTES + header.payload_bytes
            if len(self._inbox) < end:
                break
            found.append((header, bytes(self._inbox[HEADER_BYTES:end])))
            del self._inbox[:end]
        return found

    def close(self) -> None:
        """See ``transport.Sender.close``."""
        sock, self._sock = self._sock, None
        if sock is not None:
            sock.close()

    def _open(self) -> socket.socket:
        sock = self._sock
        if sock is None:
            raise TransportError(f"the connection to {self.peer} is closed")
        return sock


class BackChannel:
    """The way back to one client, for any thread."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()

    def post(self, kind: Kind, session: int = 0, body: bytes = b"") -> None:
        """Send a frame; a client that does not read it loses its connection."""
        header = Header(kind=kind, session=session, payload_bytes=len(body))
        with self._lock:
            try:
                self._sock.sendall(header.pack() + body)
            except OSError:
                # Whoever has something to say must not wait for a client that does not listen.
                with contextlib.suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)

    def reply(self, message: DataReply) -> None:
        """Send a REPLY."""
        self.post(Kind.REPLY, message.session, msgspec.msgpack.encode(message))


class Carrier(Protocol):
    """How the payloads of one accepted connection arrive."""

    def fill(self, header: Header, buffers: Sequence[memoryview]) -> None:
        """Write the block's payload into the buffers. Raises TransportError."""

    def close(self) -> None:
        """The connection is over."""


class _InBand:
    """Payloads that follow their headers on the connection itself."""

    def __init__(self, sock: socket.socket, back: BackChannel) -> None:
        self._sock = sock

    def fill(self, header: Header, buffers: Sequence[memoryview]) -> None:
        """See ``Carrier.fill``."""
        _recv_payload(self._sock, buffers)

    def close(self) -> None:
        """See ``Carrier.close``."""


class TcpListener:
    """Accepts bulk connections; one thread each, because blocking reads are the fastest."""

    def __init__(
        self,
        host: str,
        port: int,
        sink: BlockSink,
        name: str = "tcp",
        carrier: Callable[[socket.socket, BackChannel], Carrier] = _InBand,
    ) -> None:
        """``carrier`` is made for each connection once its client has shown the token."""
        self._sink = sink
        self._name = name
        self._carrier = carrier
        self._server = socket.create_server((host, port), backlog=16)
        self._host = host
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()
        self._closing = False
        self._acceptor = threading.Thread(target=self._accept, name="bulk-accept", daemon=True)
        self._acceptor.start()

    @property
    def endpoint(self) -> Endpoint:
        """Where it listens; an unspecified host is announced as the control channel's."""
        host = "" if self._host in ("", "0.0.0.0", "::") else self._host
        return Endpoint(transport=self._name, host=host, port=self._server.getsockname()[1])

    def close(self) -> None:
        """See ``transport.Listener.close``."""
        with self._lock:
            self._closing = True
            connections, threads = list(self._connections), list(self._threads)
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in (self._acceptor, *threads):
            thread.join(timeout=5.0)

    def _accept(self) -> None:
        while not self._closing:
            try:
                sock, address = self._server.accept()
            except OSError:
                if self._closing:
                    return
                logger.warning("accepting a bulk connection failed", exc_info=True)
                continue
            tune(sock)
            thread = threading.Thread(
                target=self._serve, args=(sock, f"{address[0]}:{address[1]}"), daemon=True
            )
            with self._lock:
                # ``close`` knows only of the connections that stand here when it looks.
                if self._closing:
                    sock.close()
                    return
                self._connections.add(sock)
                self._threads.add(thread)
                thread.start()

    def _serve(self, sock: socket.socket, peer: str) -> None:
        try:
            if not self._authenticate(sock):
                return
            back = BackChannel(sock)
            carrier = self._carrier(sock, back)
            try:
                self._read_frames(sock, carrier, back)
            finally:
                carrier.close()
        except (TransportError, WireError) as error:
            if not self._closing:
                logger.warning("bulk connection from %s closed: %s", peer, error)
        except Exception:
            logger.exception("bulk connection from %s failed", peer)
        finally:
            with self._lock:
                self._connections.discard(sock)
                self._threads.discard(threading.current_thread())
            sock.close()

    def _authenticate(self, sock: socket.socket) -> bool:
        """Whether a client said HELLO; False for one that only looked whether the port is open."""
        # Whoever has not shown the token gets neither time nor memory.
        _set_timeout(sock, socket.SO_RCVTIMEO, _HELLO_SECONDS)
        _set_timeout(sock, socket.SO_SNDTIMEO, _REPLY_SECONDS)
        head = memoryview(bytearray(HEADER_BYTES))
        if not _recv_into(sock, [head]):
            return False
        first = unpack(head)
        if first.kind is not Kind.HELLO:
            raise WireError(E_CREDENTIALS, "the first bulk frame must be HELLO")
        if first.payload_bytes > MAX_SMALL_PAYLOAD:
            raise WireError(E_PROTOCOL, f"a HELLO of {first.payload_bytes} bytes")
        body = memoryview(bytearray(first.payload_bytes))
        _recv_rest(sock, [body])
        try:
            hello = hello_decoder.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise WireError(E_PROTOCOL, f"a HELLO that cannot be read: {error}") from None
        self._sink.authenticate(hello)
        _set_timeout(sock, socket.SO_RCVTIMEO, 0)
        return True

    def _read_frames(self, sock: socket.socket, carrier: Carrier, back: BackChannel) -> None:
        head = memoryview(bytearray(HEADER_BYTES))
        lander = Lander(self._sink)
        attached: deque[int] = deque(maxlen=_MAX_ATTACHED)
        try:
            while _recv_into(sock, [head]):
                header = unpack_client(head)
                if header.kind is Kind.ATTACH:
                    attached.append(header.session)
                    self._sink.attach(header.session, back.reply)
                else:
                    lander.land(header, carrier.fill)
        finally:
            for session in attached:
                self._sink.detached(session)


def dial(endpoint: Endpoint, hello: DataHello, timeout: float) -> tuple[socket.socket, str]:
    """A connection that has said HELLO, and the peer's name for messages.

    Raises TransportError naming the address.
    """
    peer = f"{endpoint.host}:{endpoint.port}"
    try:
        sock = socket.create_connection((endpoint.host, endpoint.port), timeout=timeout)
    except OSError as error:
        raise TransportError(f"cannot reach {peer}: {error}") from None
    sock.settimeout(None)
    tune(sock)
    _set_timeout(sock, socket.SO_SNDTIMEO, timeout)
    body = msgspec.msgpack.encode(hello)
    header = Header(kind=Kind.HELLO, session=0, payload_bytes=len(body))
    try:
        sock.sendall(header.pack() + body)
    except OSError as error:
        sock.close()
        raise TransportError(f"cannot reach {peer}: {error}") from None
    return sock, peer


class TcpTransport:
    """See ``transport.Transport``."""

    name = "tcp"

    def listen(self, host: str, port: int, sink: BlockSink) -> Listener:
        """See ``transport.Transport.listen``."""
        return TcpListener(host, port, sink)

    def connect(self, endpoint: Endpoint, hello: DataHello, timeout: float) -> Sender:
        """See ``transport.Transport.connect``."""
        return TcpSender(*dial(endpoint, hello, timeout))
