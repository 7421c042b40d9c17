"""The receiving end of the ``tcp`` transport.

One thread is at the door: it accepts connections, reads what they must say to prove themselves
(``keys``) without ever waiting for one of them, and closes those that take too long. Each
connection that has proved itself gets a thread, because blocking reads are the fastest. What it
reads from then on is protected as the client has said (``seal``).

A transport that moves payloads by other means keeps this connection for everything else: it gives
``TcpListener`` a ``Carrier`` (see ``nixl``).
"""

from __future__ import annotations

import contextlib
import logging
import math
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from mlx_receiver.transports.carrier import BackChannel, Carrier, InBand
from mlx_receiver.transports.data_socket import recv_into, tune
from mlx_receiver.transports.landing import Lander
from mlx_receiver.transports.seal import Opener, Sealer, check_level
from mlx_receiver.transports.transport import BlockSink, TransportError
from mlx_receiver.wire.addresses import announced, listening, spelled
from mlx_receiver.wire.frames import (
    HEADER_BYTES,
    DataChallenge,
    DataReply,
    Header,
    Kind,
    Level,
    hello_decoder,
    proof_decoder,
    unpack,
    unpack_client,
)
from mlx_receiver.wire.keys import new_nonce, proof, proves
from mlx_receiver.wire.messages import (
    E_CAPACITY,
    E_CREDENTIALS,
    E_PROTOCOL,
    Endpoint,
    WireError,
)
from mlx_receiver.wire.seldom import Seldom

logger = logging.getLogger(__name__)

_CLOSED: Final = "data connection from %s closed: %s"

#: Largest payload of a frame of the handshake, in bytes.
MAX_HANDSHAKE_PAYLOAD: Final = 1024

#: Seconds for the whole handshake.
HANDSHAKE_SECONDS: Final = 5.0

#: Connections that have not proved themselves, in total and from one address. The oldest makes room
#: for the next: who has a ticket needs a round trip, so strangers cannot shut them out.
MAX_STRANGERS: Final = 64
MAX_STRANGERS_OF_ADDRESS: Final = 32

#: Connections, and so threads, of one client and of all.
MAX_OF_CLIENT: Final = 64
MAX_CONNECTIONS: Final = 512

#: Seconds within which the payload that follows a header must be here whole: until then its memory
#: is nobody else's. 64 MiB take them at 18 Mbit/s.
FRAME_SECONDS: Final = 30.0

#: ATTACHes and refused blocks a second of one connection; then it waits for the next second.
MAX_IDLE_TALK: Final = 500

#: Sessions of a connection that hear of its end: more than can be open at once.
_MAX_ATTACHED: Final = 1024

#: Bytes of replies that a client may leave unread. More than its kernel takes, and it is cut off.
_BACK_BYTES: Final = 256 << 10

#: How often, in seconds, the door looks at the clock, and whether tickets are still good.
_TICK: Final = 0.25
_TICKETS: Final = 1.0


@dataclass(frozen=True, slots=True)
class _Proved:
    """What a handshake ends with: whose connection it is, and what protects it."""

    client: str
    opener: Opener
    sealer: Sealer


#: Asks for that many bytes, gets them, and returns who that is at the end.
_Handshake = Generator[int, bytes, _Proved]


@dataclass(eq=False)
class _Stranger:
    """A connection that has not proved itself."""

    sock: socket.socket
    host: str
    peer: str
    handshake: _Handshake
    wanted: int
    until: float
    inbox: bytearray = field(default_factory=bytearray)


@dataclass(eq=False)
class _Connection:
    """A connection of a client."""

    sock: socket.socket
    proved: _Proved
    peer: str
    #: When the frame that is being read must be here.
    until: float = math.inf
    cut: bool = False

    @property
    def client(self) -> str:
        """Whose it is."""
        return self.proved.client


class _Talk:
    """What of a connection brings nothing forward but costs time."""

    def __init__(self) -> None:
        self._second = self._said = 0

    def count(self) -> None:
        """One more; waits until it may go on."""
        now = time.monotonic()
        if int(now) != self._second:
            self._second, self._said = int(now), 0
        self._said += 1
        if self._said >= MAX_IDLE_TALK:
            time.sleep(self._second + 1 - now)


class TcpListener:
    """See ``transport.Listener``."""

    def __init__(
        self,
        host: str,
        port: int,
        sink: BlockSink,
        name: str = "tcp",
        carrier: Callable[[socket.socket, BackChannel, Opener], Carrier] = InBand,
        plain: bool = False,
        level: Level | None = None,
    ) -> None:
        """``carrier`` is made for each connection that has proved itself; ``plain`` see
        ``Endpoint``. Connections of ``level`` are taken from everywhere."""
        self._sink = sink
        self._name = name
        self._carrier = carrier
        self._plain = plain
        self._level = level
        self._host = host
        self._servers = listening(host, port)
        self._port: int = self._servers[0].getsockname()[1]
        self._selector = selectors.DefaultSelector()
        #: Oldest first; the door's alone.
        self._strangers: dict[_Stranger, None] = {}
        self._complaints = Seldom(logger)
        self._next_look = 0.0
        self._lock = threading.Lock()
        self._connections: dict[_Connection, threading.Thread] = {}
        self._closing = False
        for server in self._servers:
            server.setblocking(False)
            self._selector.register(server, selectors.EVENT_READ)
        self._door = threading.Thread(target=self._keep_door, name="data-accept", daemon=True)
        self._door.start()

    @property
    def endpoint(self) -> Endpoint:
        """Where it listens; an unspecified host is announced as the control channel's."""
        return Endpoint(self._name, announced(self._host), self._port, plain=self._plain)

    def close(self) -> None:
        self._closing = True
        self._door.join(timeout=5.0)
        with self._lock:
            threads = list(self._connections.values())
            for connection in self._connections:
                _shut(connection.sock)
        for thread in threads:
            thread.join(timeout=5.0)

    # --- the door's thread --------------------------------------------------------------------

    def _keep_door(self) -> None:
        while not self._closing:
            try:
                for key, _ in self._selector.select(_TICK):
                    if key.data is None:
                        self._accept(key.fileobj)
                    elif key.data in self._strangers:
                        self._hear(key.data)
                self._expire(time.monotonic())
            except Exception:
                # Whatever it is: without a door no client comes in any more.
                logger.exception("the door of the data connections failed")
                time.sleep(_TICK)
        for stranger in list(self._strangers):
            self._dismiss(stranger)
        for server in self._servers:
            server.close()
        self._selector.close()

    def _accept(self, server: Any) -> None:
        try:
            sock, address = server.accept()
        except BlockingIOError:
            return
        except OSError as error:
            # Too few descriptors or buffers, which stays so for a while, or a connection that was
            # reset already.
            self._complaints.warning(_CLOSED, "somebody", f"accepting failed: {error}")
            time.sleep(0.05)
            return
        try:
            # macOS returns connections that were reset already, without an address; options
            # cannot be set on them.
            host, port = (address or ("", 0))[:2]
            sock.setblocking(False)
            tune(sock)
            handshake = self._handshake(sock, host)
            stranger = _Stranger(
                sock, host, spelled(host, port), handshake, next(handshake), math.inf
            )
            stranger.until = time.monotonic() + HANDSHAKE_SECONDS
            self._make_room(host)
            self._selector.register(sock, selectors.EVENT_READ, stranger)
            self._strangers[stranger] = None
        except Exception as error:
            self._complaints.warning(_CLOSED, str(address), error)
            sock.close()

    def _make_room(self, host: str) -> None:
        """Let another stranger in by sending the oldest one away."""
        same = [stranger for stranger in self._strangers if stranger.host == host]
        if len(same) >= MAX_STRANGERS_OF_ADDRESS:
            self._dismiss(same[0], "too many connections from there have not said who they are")
        elif len(self._strangers) >= MAX_STRANGERS:
            oldest = next(iter(self._strangers))
            self._dismiss(oldest, "too many connections have not said who they are")

    def _hear(self, stranger: _Stranger) -> None:
        """Read what a stranger says, no further than its handshake."""
        try:
            data = stranger.sock.recv(stranger.wanted - len(stranger.inbox))
            if not data:
                # Perhaps it only looked whether the port is open.
                self._dismiss(stranger)
                return
            stranger.inbox += data
            if len(stranger.inbox) < stranger.wanted:
                return
            heard, stranger.inbox = bytes(stranger.inbox), bytearray()
            stranger.wanted = stranger.handshake.send(heard)
        except BlockingIOError:
            return
        except StopIteration as done:
            self._admit(stranger, done.value)
        except (OSError, WireError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            self._dismiss(stranger, error)
        except Exception as error:
            logger.exception("the handshake with %s failed", stranger.peer)
            self._dismiss(stranger, error)

    def _handshake(self, sock: socket.socket, host: str) -> _Handshake:
        """The receiver's side of the handshake, see ``keys``. Raises WireError, MsgspecError."""
        hello = hello_decoder.decode((yield from _frame(Kind.HELLO)))
        key, level = self._sink.data_key(hello.client), hello.level
        if level != self._level:
            check_level(level, host, self._plain)
        nonce = new_nonce()
        context = (hello.nonce, nonce, level.encode())
        challenge = DataChallenge(nonce, proof(key, "receiver", *context))
        body = msgspec.msgpack.encode(challenge)
        # The first words on a connection fit into the kernel's buffer.
        sock.sendall(Header(Kind.CHALLENGE, 0, len(body)).pack() + body)
        answer = proof_decoder.decode((yield from _frame(Kind.PROOF)))
        if not proves(answer.proof, key, "client", *context):
            raise WireError(E_CREDENTIALS, f"it is not client {hello.client}")
        nonces = hello.nonce + nonce
        return _Proved(
            hello.client,
            Opener(level, key, nonces, "client"),
            Sealer(level, key, nonces, "receiver"),
        )

    def _admit(self, stranger: _Stranger, proved: _Proved) -> None:
        """Give a connection that has proved itself a thread."""
        client = proved.client
        self._selector.unregister(stranger.sock)
        del self._strangers[stranger]
        connection = _Connection(stranger.sock, proved, stranger.peer)
        try:
            connection.sock.setblocking(True)
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BACK_BYTES)
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            with self._lock:
                of_client = sum(other.client == client for other in self._connections)
                if of_client >= MAX_OF_CLIENT or len(self._connections) >= MAX_CONNECTIONS:
                    raise WireError(
                        E_CAPACITY,
                        f"the client has {of_client} connections, all have "
                        f"{len(self._connections)}: {MAX_OF_CLIENT} and {MAX_CONNECTIONS} are "
                        "allowed",
                    )
                thread.start()
                self._connections[connection] = thread
        except Exception as error:
            self._complaints.warning(_CLOSED, connection.peer, error)
            connection.sock.close()

    def _expire(self, now: float) -> None:
        """Close what has had its time."""
        for stranger in list(self._strangers):
            if stranger.until > now:
                break  # the others are younger
            self._dismiss(stranger, f"it did not say who it is within {HANDSHAKE_SECONDS:g} s")
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            if connection.until < now:
                self._cut(connection, f"a frame took longer than {FRAME_SECONDS:g} s")
        if now < self._next_look:
            return
        self._next_look = now + _TICKETS
        for client in {connection.client for connection in connections}:
            try:
                self._sink.data_key(client)
            except WireError:
                for connection in connections:
                    if connection.client == client:
                        self._cut(connection, "its client has gone")

    def _cut(self, connection: _Connection, reason: str) -> None:
        """Have a connection's thread end."""
        with self._lock:
            if connection.cut or connection not in self._connections:
                return
            connection.cut = True
            # Under the lock, or the descriptor might be another's by now.
            _shut(connection.sock)
        self._complaints.warning(_CLOSED, connection.peer, reason)

    def _dismiss(self, stranger: _Stranger, reason: object = None) -> None:
        del self._strangers[stranger]
        self._selector.unregister(stranger.sock)
        stranger.sock.close()
        if reason is not None:
            self._complaints.warning(_CLOSED, stranger.peer, reason)

    # --- a connection's thread ------------------------------------------------------------------

    def _serve(self, connection: _Connection) -> None:
        try:
            proved = connection.proved
            back = BackChannel(connection.sock, proved.sealer)
            carrier = self._carrier(connection.sock, back, proved.opener)
            try:
                self._read_frames(connection, carrier, back)
            finally:
                carrier.close()
        except (TransportError, WireError) as error:
            if not self._closing and not connection.cut:
                self._complaints.warning(_CLOSED, connection.peer, error)
        except Exception:
            logger.exception("data connection from %s failed", connection.peer)
        finally:
            with self._lock:
                self._connections.pop(connection, None)
                connection.sock.close()

    def _read_frames(self, connection: _Connection, carrier: Carrier, back: BackChannel) -> None:
        client, opener = connection.client, connection.proved.opener
        head = bytearray(opener.head_bytes)
        lander = Lander(self._sink)
        attached: deque[int] = deque(maxlen=_MAX_ATTACHED)
        talk = _Talk()

        def fill(header: Header, buffers: Sequence[memoryview], wanted: bool) -> None:
            connection.until = time.monotonic() + FRAME_SECONDS
            carrier.fill(header, buffers, wanted)
            connection.until = math.inf

        try:
            while recv_into(connection.sock, [memoryview(head)]):
                header = unpack_client(opener.small(bytes(head)))
                if header.kind is Kind.ATTACH:
                    attached.append(header.session)
                    self._sink.attach(client, header.session, back.reply)
                    talk.count()
                elif header.kind is Kind.PROBE:
                    lander.discard(header, fill)
                    back.reply(DataReply(0, True))
                    talk.count()
                elif not lander.land(client, header, fill):
                    talk.count()
        finally:
            for session in attached:
                self._sink.detached(client, session)


def _frame(kind: Kind) -> Generator[int, bytes, bytes]:
    """The payload of the next frame of a handshake. Raises WireError for another kind of frame."""
    header = unpack((yield HEADER_BYTES))
    if header.kind is not kind:
        raise WireError(E_CREDENTIALS, f"{header.kind.name} came where {kind.name} must")
    if not 0 < header.payload_bytes <= MAX_HANDSHAKE_PAYLOAD:
        raise WireError(E_PROTOCOL, f"a {kind.name} of {header.payload_bytes} bytes")
    return (yield header.payload_bytes)


def _shut(sock: socket.socket) -> None:
    """Have every thread that reads from or writes to it stop."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
