"""The ``tcp`` transport: plain blocking sockets, scatter/gather, no copies.

Sending is ``sendmsg([header, payload])``; receiving is ``recvmsg_into`` straight into the
receiver's cache memory with MSG_WAITALL. TCP's own window is the flow control: the receiver
reads only into memory that a session has reserved, so a slow receiver makes ``send`` block.

Timeouts are the kernel's SO_SNDTIMEO and SO_RCVTIMEO: Python's ``settimeout`` would make the
descriptor non-blocking, on which MSG_WAITALL has no effect.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import struct
import threading
from collections.abc import Sequence
from zlib import crc32

import msgspec

from mlx_receiver.wire.frames import (
    HEADER_BYTES,
    DataHello,
    DataReply,
    Header,
    Kind,
    hello_decoder,
    reply_decoder,
    unpack,
)
from mlx_receiver.wire.messages import E_BLOCK, E_CREDENTIALS, E_PROTOCOL, Endpoint, WireError
from mlx_receiver.wire.transport import BlockSink, Landing, Listener, Sender, TransportError

logger = logging.getLogger(__name__)

_SCRATCH_BYTES = 1 << 20
_MAX_SMALL_PAYLOAD = 64 << 10
_HELLO_SECONDS = 5.0
_REPLY_SECONDS = 1.0


def _set_timeout(sock: socket.socket, option: int, seconds: float) -> None:
    sock.setsockopt(
        socket.SOL_SOCKET, option, struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
    )


def _recv_into(sock: socket.socket, buffers: list[memoryview]) -> bool:
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
        while todo and count >= todo[0].nbytes:
            count -= todo.pop(0).nbytes
        if count:
            todo[0] = todo[0][count:]
    return True


class TcpSender:
    """A vLLM worker's bulk connection."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self._sock: socket.socket | None = sock
        self._peer = peer
        self._inbox = bytearray()

    def send(self, header: Header, payload: Sequence[memoryview] = ()) -> None:
        """See ``transport.Sender.send``."""
        if self._sock is None:
            raise TransportError(f"the connection to {self._peer} is closed")
        todo = [memoryview(header.pack()), *payload]
        try:
            while todo:
                sent = self._sock.sendmsg(todo)
                while todo and sent >= todo[0].nbytes:
                    sent -= todo.pop(0).nbytes
                if sent:
                    todo[0] = todo[0][sent:]
        except BlockingIOError:
            self.close()
            raise TransportError(f"{self._peer} has read nothing for too long") from None
        except OSError as error:
            self.close()
            raise TransportError(f"the connection to {self._peer} broke: {error}") from None

    def replies(self) -> list[DataReply]:
        """See ``transport.Sender.replies``."""
        if self._sock is None:
            raise TransportError(f"the connection to {self._peer} is closed")
        while select.select([self._sock], [], [], 0)[0]:
            try:
                data = self._sock.recv(_MAX_SMALL_PAYLOAD)
            except OSError as error:
                self.close()
                raise TransportError(f"the connection to {self._peer} broke: {error}") from None
            if not data:
                self.close()
                raise TransportError(f"{self._peer} closed the connection")
            self._inbox += data
        found = []
        while len(self._inbox) >= HEADER_BYTES:
            header = unpack(self._inbox[:HEADER_BYTES])
            end = HEADER_BYTES + header.payload_bytes
            if len(self._inbox) < end:
                break
            found.append(reply_decoder.decode(self._inbox[HEADER_BYTES:end]))
            del self._inbox[:end]
        return found

    def fileno(self) -> int:
        """For ``select``: readable when replies wait. -1 once closed."""
        return -1 if self._sock is None else self._sock.fileno()

    def close(self) -> None:
        """See ``transport.Sender.close``."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None


class TcpListener:
    """Accepts bulk connections; one thread each, because blocking reads are the fastest."""

    def __init__(self, host: str, port: int, sink: BlockSink) -> None:
        self._sink = sink
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
        return Endpoint(transport="tcp", host=host, port=self._server.getsockname()[1])

    def close(self) -> None:
        """See ``transport.Listener.close``."""
        self._closing = True
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        with self._lock:
            connections, threads = list(self._connections), list(self._threads)
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
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            thread = threading.Thread(
                target=self._serve, args=(sock, f"{address[0]}:{address[1]}"), daemon=True
            )
            with self._lock:
                self._connections.add(sock)
                self._threads.add(thread)
            thread.start()

    def _serve(self, sock: socket.socket, peer: str) -> None:
        try:
            self._read_frames(sock)
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

    def _read_frames(self, sock: socket.socket) -> None:
        send_lock = threading.Lock()
        head = memoryview(bytearray(HEADER_BYTES))
        scratch = memoryview(bytearray(_SCRATCH_BYTES))

        def reply(message: DataReply) -> None:
            body = msgspec.msgpack.encode(message)
            header = Header(kind=Kind.REPLY, session=message.session, payload_bytes=len(body))
            with send_lock:
                try:
                    sock.sendall(header.pack() + body)
                except OSError:
                    # A client that reads no replies must not hold up whoever has one for it.
                    with contextlib.suppress(OSError):
                        sock.shutdown(socket.SHUT_RDWR)

        # Whoever has not shown the token gets neither time nor memory.
        _set_timeout(sock, socket.SO_RCVTIMEO, _HELLO_SECONDS)
        _set_timeout(sock, socket.SO_SNDTIMEO, _REPLY_SECONDS)
        if not _recv_into(sock, [head]):
            return
        first = unpack(head)
        if first.kind is not Kind.HELLO:
            raise WireError(E_CREDENTIALS, "the first bulk frame must be HELLO")
        self._sink.authenticate(hello_decoder.decode(self._small(sock, first)))
        _set_timeout(sock, socket.SO_RCVTIMEO, 0)

        while _recv_into(sock, [head]):
            try:
                header = unpack(head)
            except WireError as error:
                if error.code != E_BLOCK:
                    raise
                # The header lies about its payload: nothing after it can be found.
                raise WireError(E_PROTOCOL, error.reason) from None
            if header.kind is Kind.ATTACH:
                self._sink.attach(header.session, reply)
            elif header.kind is Kind.BLOCK:
                self._receive_block(sock, header, scratch, reply)
            else:
                raise WireError(E_PROTOCOL, f"a client must not send {header.kind.name}")

    def _small(self, sock: socket.socket, header: Header) -> bytes:
        if header.payload_bytes > _MAX_SMALL_PAYLOAD:
            raise WireError(E_PROTOCOL, f"a {header.kind.name} of {header.payload_bytes} bytes")
        body = memoryview(bytearray(header.payload_bytes))
        if body.nbytes and not _recv_into(sock, [body]):
            raise TransportError("the connection closed inside a frame")
        return bytes(body)

    def _receive_block(
        self,
        sock: socket.socket,
        header: Header,
        scratch: memoryview,
        reply: object,
    ) -> None:
        try:
            landing = self._sink.landing(header)
        except WireError as error:
            self._sink.rejected(header, error.code, error.reason)
            landing = Landing(_repeat(scratch, header.payload_bytes))
        try:
            if not _recv_into(sock, list(landing.buffers)):
                raise TransportError("the connection closed inside a frame")
        except TransportError:
            landing.abort()
            raise
        try:
            if header.checksum and header.checksum != _checksum(landing.buffers):
                landing.abort()
                raise WireError(E_BLOCK, f"{header.describe()}: the checksum does not match")
            landing.commit()
        except WireError as error:
            self._sink.rejected(header, error.code, error.reason)


def _repeat(scratch: memoryview, count: int) -> list[memoryview]:
    whole, rest = divmod(count, scratch.nbytes)
    return [scratch] * whole + [scratch[:rest]]


def _checksum(buffers: Sequence[memoryview]) -> int:
    value = 0
    for buffer in buffers:
        value = crc32(buffer, value)
    return value or 1


class TcpTransport:
    """See ``transport.Transport``."""

    name = "tcp"

    def listen(self, host: str, port: int, sink: BlockSink) -> Listener:
        """See ``transport.Transport.listen``."""
        return TcpListener(host, port, sink)

    def connect(self, endpoint: Endpoint, hello: DataHello, timeout: float) -> Sender:
        """See ``transport.Transport.connect``."""
        peer = f"{endpoint.host}:{endpoint.port}"
        try:
            sock = socket.create_connection((endpoint.host, endpoint.port), timeout=timeout)
        except OSError as error:
            raise TransportError(f"cannot reach {peer}: {error}") from None
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _set_timeout(sock, socket.SO_SNDTIMEO, timeout)
        sender = TcpSender(sock, peer)
        body = msgspec.msgpack.encode(hello)
        sender.send(Header(kind=Kind.HELLO, session=0, payload_bytes=len(body)), [memoryview(body)])
        return sender
