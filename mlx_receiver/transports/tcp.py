"""The ``tcp`` transport: blocking sockets, scatter/gather, no copies of consequence.

Sending is ``sendmsg([header, payload])``; receiving is ``recvmsg_into`` straight into the
receiver's cache memory with MSG_WAITALL. TCP's own window is the flow control: the receiver
reads only into memory that a session has reserved, so a slow receiver makes ``send`` block.

Both ends prove that they know the client's ticket (``keys``) before anything else is said. Between
machines every frame is then encrypted and authenticated (``seal``): the sender encrypts a chunk at
a time beside the payload, the receiver decrypts in the cache's memory. This is the sending end,
``tcp_listener`` the receiving one.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from mlx_receiver.transports.data_socket import advance, set_send_timeout, tune
from mlx_receiver.transports.seal import Opener, Sealer, level_for
from mlx_receiver.transports.tcp_listener import MAX_HANDSHAKE_PAYLOAD, TcpListener
from mlx_receiver.transports.transport import BlockSink, Listener, Sender, TransportError
from mlx_receiver.wire.addresses import Address, spelled, try_each
from mlx_receiver.wire.frames import (
    HEADER_BYTES,
    MAX_SMALL_PAYLOAD,
    DataHello,
    DataProof,
    DataReply,
    Header,
    Kind,
    Level,
    challenge_decoder,
    decode_reply,
    unpack,
)
from mlx_receiver.wire.keys import new_nonce, proof, proves
from mlx_receiver.wire.messages import E_PROTOCOL, DataTicket, Endpoint, WireError

#: A peer that takes less than this within the connection's timeout stands still: the two kernels'
#: buffers alone take some, a little at a time.
_STANDSTILL_BYTES: Final = 1 << 20

#: Bytes read at most by one look for replies: a peer that never stops sending holds nobody up.
_MAX_INBOX: Final = 4 * MAX_SMALL_PAYLOAD


#: Linux's IP_MTU and IPV6_MTU (``linux/in.h``, ``linux/in6.h``), which Python does not name.
_MTU: Final = {
    socket.AF_INET: (socket.IPPROTO_IP, 14),
    socket.AF_INET6: (socket.IPPROTO_IPV6, 24),
}


@dataclass(frozen=True, slots=True)
class Dialled:
    """A connection whose two ends have proved themselves; ``peer`` is its name for messages."""

    sock: socket.socket
    peer: str
    sealer: Sealer
    opener: Opener


class TcpSender:
    """See ``transport.Sender``."""

    def __init__(self, dialled: Dialled) -> None:
        self.peer = dialled.peer
        self._sock: socket.socket | None = dialled.sock
        self._sealer, self._opener = dialled.sealer, dialled.opener
        self._inbox = bytearray()
        #: The header of a frame whose payload is not there yet.
        self._header: Header | None = None

    def send(self, header: Header, payload: Sequence[memoryview] = ()) -> None:
        sock = self._open()
        try:
            for todo in self._sealer.frame(header.pack(), payload):
                while todo:
                    count = sock.sendmsg(todo)
                    advance(todo, count)
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
        return [decode_reply(body) for _, body in self.frames()]

    def frames(self) -> list[tuple[Header, bytes]]:
        """Frames that have arrived since the last call, with their payloads; never blocks.

        Raises TransportError when the connection is gone, WireError for what is no frame or one
        that is too large. Nothing can be read after either.
        """
        sock = self._open()
        while len(self._inbox) < _MAX_INBOX:
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
        try:
            return self._read_inbox()
        except TransportError as error:
            self.close()
            raise TransportError(f"the connection to {self.peer} broke: {error}") from None
        except WireError:
            self.close()
            raise

    def _read_inbox(self) -> list[tuple[Header, bytes]]:
        """The frames that are there whole. Raises TransportError, WireError."""
        found, start = [], 0
        opener = self._opener
        while True:
            if self._header is None:
                end = start + opener.head_bytes
                if len(self._inbox) < end:
                    break
                header = unpack(opener.small(bytes(self._inbox[start:end])))
                if header.payload_bytes > MAX_SMALL_PAYLOAD:
                    raise WireError(E_PROTOCOL, f"{self.peer} sends {header.payload_bytes} bytes")
                self._header, start = header, end
            body, count = b"", self._header.payload_bytes
            if count:
                end = start + count + opener.tag_bytes
                if len(self._inbox) < end:
                    break
                body, start = opener.small(bytes(self._inbox[start:end])), end
            found.append((self._header, body))
            self._header = None
        del self._inbox[:start]
        return found

    @property
    def mtu(self) -> int:
        """The largest packet on the way, in bytes; 0 where the system does not say."""
        option = _MTU.get(self._sock.family) if self._sock is not None else None
        if option is None or self._sock is None or sys.platform != "linux":
            return 0
        try:
            return self._sock.getsockopt(*option)
        except OSError:
            return 0

    def close(self) -> None:
        sock, self._sock = self._sock, None
        if sock is not None:
            sock.close()

    def _open(self) -> socket.socket:
        sock = self._sock
        if sock is None:
            raise TransportError(f"the connection to {self.peer} is closed")
        return sock


def dial(
    endpoint: Endpoint,
    ticket: DataTicket,
    timeout: float,
    choose: Callable[[str, Endpoint], Level] = level_for,
) -> Dialled:
    """Connect and prove. ``choose`` says how an address's connection is to be protected.

    Raises TransportError naming the address.
    """

    def attempt(address: Address, until: float) -> Dialled:
        level = choose(address.host, endpoint)
        sock = socket.socket(address.family, socket.SOCK_STREAM)
        try:
            # For the handshake alone: every wait ends when its time is over.
            sock.settimeout(max(until - time.monotonic(), 0.001))
            try:
                sock.connect(address.sockaddr)
            except OSError as error:
                raise TransportError(f"cannot reach {address.text}: {error}") from None
            tune(sock)
            nonces = _greet(sock, address.text, ticket, level, until)
            sock.settimeout(None)
            set_send_timeout(sock, timeout)
        except BaseException:
            sock.close()
            raise
        return Dialled(
            sock,
            address.text,
            Sealer(level, ticket.key, nonces, "client"),
            Opener(level, ticket.key, nonces, "receiver"),
        )

    try:
        return try_each(endpoint.host, endpoint.port, timeout, attempt)
    except TransportError:
        raise
    except OSError as error:
        peer = spelled(endpoint.host, endpoint.port)
        raise TransportError(f"cannot reach {peer}: {error}") from None


def _greet(sock: socket.socket, peer: str, ticket: DataTicket, level: Level, until: float) -> bytes:
    """Have the receiver prove that it gave the ticket, then show that it is ours; both nonces."""
    nonce = new_nonce()
    try:
        _say(sock, Kind.HELLO, DataHello(ticket.client, nonce, level))
        challenge = challenge_decoder.decode(_hear(sock, Kind.CHALLENGE, until))
        context = (nonce, challenge.nonce, level.encode())
        if not proves(challenge.proof, ticket.key, "receiver", *context):
            raise TransportError(
                f"another program answers at {peer}, not the receiver that was asked for: it "
                "cannot prove that it knows this client"
            )
        _say(sock, Kind.PROOF, DataProof(proof(ticket.key, "client", *context)))
        return nonce + challenge.nonce
    except TransportError:
        raise
    except TimeoutError:
        raise TransportError(f"{peer} did not answer the greeting in time") from None
    except OSError as error:
        raise TransportError(f"{peer} broke the connection off: {error}") from None
    except (WireError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise TransportError(f"another program answers at {peer}: {error}") from None


def _say(sock: socket.socket, kind: Kind, message: DataHello | DataProof) -> None:
    body = msgspec.msgpack.encode(message)
    sock.sendall(Header(kind=kind, session=0, payload_bytes=len(body)).pack() + body)


def _hear(sock: socket.socket, kind: Kind, until: float) -> bytes:
    """The payload of a frame of that kind. Raises TimeoutError, WireError, OSError."""
    header = unpack(_read(sock, HEADER_BYTES, until))
    if header.kind is not kind or header.payload_bytes > MAX_HANDSHAKE_PAYLOAD:
        raise WireError(E_PROTOCOL, f"{header.kind.name} of {header.payload_bytes} bytes")
    return _read(sock, header.payload_bytes, until)


def _read(sock: socket.socket, count: int, until: float) -> bytes:
    data = b""
    while len(data) < count:
        # A byte now and then must not make it longer.
        sock.settimeout(max(until - time.monotonic(), 0.001))
        more = sock.recv(count - len(data))
        if not more:
            raise ConnectionResetError(
                "it does not know this client (has it restarted?) or is no receiver"
            )
        data += more
    return data


class TcpTransport:
    """See ``transport.Transport``."""

    name = "tcp"

    def __init__(self, level: Level | None = None) -> None:
        """``level`` is for measuring and testing: how every connection is protected, whatever is
        usual between its ends."""
        self._level = level

    def listen(self, host: str, port: int, sink: BlockSink, plain: bool = False) -> Listener:
        return TcpListener(host, port, sink, plain=plain, level=self._level)

    def connect(self, endpoint: Endpoint, ticket: DataTicket, timeout: float) -> Sender:
        return TcpSender(dial(endpoint, ticket, timeout, self._choose))

    def _choose(self, host: str, endpoint: Endpoint) -> Level:
        return self._level or level_for(host, endpoint)
