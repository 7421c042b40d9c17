"""The control channel: one thread that owns the ZeroMQ socket and talks to every client."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
import uuid
from collections import deque
from dataclasses import dataclass, field
from typing import Final

import msgspec
import zmq

from mlx_receiver.control.credentials import Credentials
from mlx_receiver.control.lobby import Choose
from mlx_receiver.control.port import bind, open_port
from mlx_receiver.sessions.client import Client
from mlx_receiver.sessions.proofs import proof_prompt
from mlx_receiver.sessions.service import SessionService
from mlx_receiver.wire import keys
from mlx_receiver.wire.codec import client_decoder, decode_client, encode, opened_session
from mlx_receiver.wire.handshake import introduction
from mlx_receiver.wire.layout import CacheLayout
from mlx_receiver.wire.messages import (
    E_CREDENTIALS,
    E_MODEL,
    E_PROTOCOL,
    E_SHUTDOWN,
    E_UNSUPPORTED,
    MAX_MESSAGE_BYTES,
    Cancel,
    ClientMessage,
    DataPath,
    Endpoint,
    Failed,
    Hello,
    Open,
    Ping,
    ReceiverMessage,
    Refused,
    Rejected,
    Start,
    Welcome,
    WireError,
    clipped,
)
from mlx_receiver.wire.quantised import CODECS
from mlx_receiver.wire.seldom import Seldom, printable
from mlx_receiver.wire.signature import ModelSignature

logger = logging.getLogger(__name__)

#: A client that says nothing for this many seconds is taken for dead.
SILENCE_SECONDS: Final = 5.0

_MAX_CLIENTS: Final = 64
#: Bytes that may wait for one client before it is given up as too slow.
_MAX_UNSENT_BYTES: Final = 4 << 20
_TICK_SECONDS: Final = 0.2
#: Seconds for which messages are read before answers go out.
_READ_SECONDS: Final = 0.02


@dataclass(slots=True)
class _Unsent:
    """Messages that a connection has no room for yet, the oldest first."""

    frames: deque[bytes] = field(default_factory=deque)
    nbytes: int = 0


class ControlServer:
    """A ROUTER socket and its thread. ``bind`` first, ``start`` when there is a model to serve."""

    def __init__(
        self,
        sessions: SessionService,
        signature: ModelSignature,
        credentials: Credentials,
        choose: Choose | None = None,
    ) -> None:
        """``choose`` where the model is whichever vLLM serves: a client of another one makes it the
        ``wanted`` one, unless there are clients of this one."""
        self._sessions = sessions
        self._signature = signature
        self._layout: CacheLayout | None = None
        self._refusal = ""
        max_tokens = sessions.source.max_tokens
        self._decoder = client_decoder(max_tokens, signature.vocab_size)
        self._context = zmq.Context()
        # A token of the prompt takes up to 5 bytes, everything else little.
        largest = min(5 * max_tokens + (1 << 20), MAX_MESSAGE_BYTES)
        self._credentials = credentials
        self._socket, self._guard = open_port(self._context, credentials, largest)
        self._clients: dict[bytes, Client] = {}
        #: Whose each client's connection is.
        self._descriptors: dict[int, bytes] = {}
        #: With which key, and from where, each client has come.
        self._origins: dict[bytes, tuple[bytes, str]] = {}
        # Other threads append here and wake the socket's thread through a pair of sockets.
        self._outbox: deque[tuple[bytes, ReceiverMessage]] = deque()
        self._unsent: dict[bytes, _Unsent] = {}
        self._complaints = Seldom(logger)
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)
        self._choose = choose
        #: The model that a client asks for instead of this one.
        self.wanted = ""
        #: Without the ticket that each client gets; None until there is a model to serve.
        self._welcome: Welcome | None = None

    def bind(self, host: str, port: int) -> int:
        """See ``port.bind``."""
        port = bind(self._socket, host, port)
        self._thread.start()
        return port

    def start(
        self,
        model: str,
        engine: str,
        endpoints: list[Endpoint],
        max_tokens: int,
        layout: CacheLayout,
        refusal: str = "",
    ) -> None:
        """Answer clients from now on; what they sent before has been kept. ``layout`` is what the
        model's cache consists of; ``refusal`` why nothing can be handed off."""
        self._layout = layout
        self._refusal = refusal
        self._welcome = Welcome(
            receiver=uuid.uuid4().hex,
            model=model,
            engine=engine,
            endpoints=endpoints,
            ticket=keys.new_ticket(),
            max_tokens=max_tokens,
            codecs=list(CODECS),
        )
        self._wake()

    def stop(self, timeout: float = 1.0) -> None:
        """Tell every client, then close."""
        self._stopping.set()
        self._wake()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        elif not self._context.closed:
            self._close()

    @property
    def clients(self) -> list[str]:
        """Names of the clients that are connected."""
        return [client.name for client in list(self._clients.values())]

    @property
    def links(self) -> dict[str, DataPath]:
        """Of clients that have measured it: the way that their blocks take."""
        return {
            client.name: path
            for client in list(self._clients.values())
            if (path := client.path) is not None
        }

    @property
    def paths(self) -> dict[str, str]:
        """The same in words."""
        return {name: printable(path.text) for name, path in self.links.items()}

    @property
    def proofs(self) -> dict[str, str]:
        """Of clients whose cache was compared with this receiver's: what that gave, in words."""
        return {
            client.name: verdict.text
            for client in list(self._clients.values())
            if client.said is not None
            and (verdict := self._sessions.proofs.verdict(client.said, client.key)) is not None
        }

    def _post(self, identity: bytes, message: ReceiverMessage) -> None:
        """Send from any thread."""
        self._outbox.append((identity, message))
        self._wake()

    def _wake(self) -> None:
        # A full pipe means that a wake-up is pending already.
        with contextlib.suppress(OSError):
            self._wake_write.send(b"\0")

    # --- the control thread --------------------------------------------------------------------

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._guard.events, zmq.POLLIN)
        poller.register(self._wake_read, zmq.POLLIN)
        next_sweep = time.monotonic()
        while not self._stopping.is_set():
            if self._welcome is not None:
                poller.register(self._socket, zmq.POLLIN)
            poller.poll(int(_TICK_SECONDS * 1000))
            with contextlib.suppress(OSError):
                self._wake_read.recv(4096)
            self._guard.watch(self._gone)
            if self._welcome is not None:
                self._receive()
            if time.monotonic() >= next_sweep:
                next_sweep = time.monotonic() + _TICK_SECONDS
                self._sweep()
            self._flush()
        for identity, client in list(self._clients.items()):
            self._say_goodbye(identity, client)
        self._flush()
        self._close()

    def _close(self) -> None:
        self._guard.close()
        self._context.term()
        self._wake_read.close()
        self._wake_write.close()

    def _receive(self) -> None:
        # A bounded share of the thread's time: answers must go out as well.
        until = time.monotonic() + _READ_SECONDS
        while time.monotonic() < until:
            try:
                identity, *frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            try:
                self._handle(identity.bytes, frames)
            except Exception:
                logger.exception("a control message could not be handled")

    def _handle(self, identity: bytes, frames: list[zmq.Frame]) -> None:
        client = self._clients.get(identity)
        try:
            if len(frames) != 1:
                raise WireError(E_PROTOCOL, f"a control message of {len(frames)} frames, not 1")
            (frame,) = frames
            try:
                message = decode_client(frame.bytes, self._decoder)
            except WireError as error:
                session = opened_session(frame.bytes)
                if client is None or session is None:
                    raise
                # What one request asks for is no reason to part.
                client.post(Refused(session, E_UNSUPPORTED, clipped(error.reason)))
                return
            if isinstance(message, Hello):
                origin = str(frame.get("User-Id")).encode(), str(frame.get("Peer-Address"))
                self._greet(identity, message, int(frame.get(zmq.SRCFD)), origin)
                return
            if client is None:
                raise WireError(
                    E_PROTOCOL,
                    "say Hello first: this receiver does not know the connection, or has dropped "
                    f"it after {SILENCE_SECONDS:.0f} s of silence",
                )
        except WireError as error:
            self._complaints.warning("refused a control message: %s", error)
            self._outbox.append((identity, Rejected(error.code, clipped(error.reason))))
            return
        client.last_heard = time.monotonic()
        self._serve(client, message)

    def _serve(self, client: Client, message: ClientMessage) -> None:
        match message:
            case Ping():
                client.path = message.path
                client.post(self._sessions.status(client, message.sent_ns))
            case Open():
                try:
                    self._sessions.open(client, message)
                except WireError as error:
                    client.post(Refused(message.session, error.code, clipped(error.reason)))
            case Start():
                try:
                    self._sessions.start(client, message)
                except WireError as error:
                    client.post(Failed(message.session, error.code, clipped(error.reason)))
            case Cancel():
                self._sessions.cancel(client, message)

    def _greet(
        self, identity: bytes, hello: Hello, descriptor: int, origin: tuple[bytes, str]
    ) -> None:
        """Welcome a client. Raises WireError saying why not."""
        assert self._welcome is not None
        if identity in self._clients:
            raise WireError(E_PROTOCOL, "this connection has said Hello already")
        peer = introduction(hello)
        self._check_model(peer.model)
        assert self._layout is not None
        if self._refusal:
            raise WireError(
                E_MODEL,
                f"{self._welcome.model} is served by the receiver's own API, but not handed off: "
                f"{self._refusal}",
            )
        differences = self._signature.differences(peer.signature)
        differences += self._layout.differences(peer.layout)
        if differences:
            raise WireError(
                E_MODEL,
                f"the receiver serves {self._welcome.model}, which is not the client's model: "
                + "; ".join(differences),
            )
        key = origin[0].decode()
        verdict = self._sessions.proofs.verdict(peer, key)
        if verdict is not None and not verdict.same:
            raise WireError(E_MODEL, verdict.text)
        if len(self._clients) >= _MAX_CLIENTS:
            raise WireError(E_UNSUPPORTED, f"{_MAX_CLIENTS} clients are connected already")
        ticket = keys.new_ticket()
        client = Client(
            ticket.client,
            peer.client,
            peer.layout,
            lambda message: self._post(identity, message),
            self._sessions,
            min(
                self._layout.limit(peer.layout) or self._welcome.max_tokens,
                self._welcome.max_tokens,
            ),
            peer,
            key,
        )
        self._guard.watch(self._gone)
        self._guard.welcome(descriptor)
        self._clients[identity] = client
        self._descriptors[descriptor] = identity
        self._origins[identity] = origin
        self._sessions.store.admit(ticket)
        logger.info(
            "client %s (%s) connected, KV in %s", peer.client, peer.engine, peer.layout.kv_dtype
        )
        prompt = []
        if verdict is None:
            prompt = proof_prompt(self._layout, self._signature.vocab_size, client.context)
        client.post(
            msgspec.structs.replace(
                self._welcome,
                ticket=ticket,
                max_tokens=client.context,
                proof_token_ids=prompt,
                profile=self._sessions.news(client),
            )
        )

    def _check_model(self, asked: str) -> None:
        """Raise WireError for a client that serves another model than the one that was loaded for
        whoever came first."""
        if self._choose is None:
            return
        assert self._welcome is not None
        model = self._choose(asked)
        if model == self._welcome.model:
            return
        if self._clients:
            raise WireError(
                E_MODEL,
                f"the receiver serves {self._welcome.model} to another vLLM; it loads "
                f"{model} when that one has gone",
            )
        self.wanted = model
        raise WireError(E_MODEL, f"this receiver loads {model} now: try again soon")

    def _sweep(self) -> None:
        now = time.monotonic()
        for identity, client in list(self._clients.items()):
            if client.last_heard + SILENCE_SECONDS < now:
                self._forget(identity, "silent", f"said nothing for {SILENCE_SECONDS:.0f} s")
            elif not self._credentials.allows(*self._origins[identity]):
                self._outbox.append(
                    (identity, Rejected(E_CREDENTIALS, "it is not paired any more"))
                )
                self._forget(identity, "unpaired", "it is not paired any more")
        self._sessions.store.sweep()

    def _gone(self, descriptor: int) -> None:
        """A client's connection has ended."""
        identity = self._descriptors.pop(descriptor, None)
        if identity is not None:
            self._forget(identity, "disconnected", "it closed the connection")

    def _forget(self, identity: bytes, outcome: str, why: str) -> None:
        self._discard(identity)
        client = self._clients.pop(identity, None)
        self._origins.pop(identity, None)
        for descriptor, owner in list(self._descriptors.items()):
            if owner == identity:
                del self._descriptors[descriptor]
                self._guard.dismiss(descriptor)
        if client is None:
            return
        dropped = self._sessions.drop_client(client, outcome)
        if outcome == "disconnected" and not dropped:
            logger.info("client %s left", client.name)
        else:
            self._complaints.warning(
                "client %s dropped with %d sessions: %s", client.name, dropped, why
            )

    def _discard(self, identity: bytes) -> None:
        """Throw away what waits for a connection."""
        unsent = self._unsent.pop(identity, None)
        if unsent is not None:
            self._sessions.store.budget.queued -= unsent.nbytes

    def _flush(self) -> None:
        budget = self._sessions.store.budget
        while self._outbox:
            identity, message = self._outbox.popleft()
            frame = encode(message)
            unsent = self._unsent.setdefault(identity, _Unsent())
            unsent.frames.append(frame)
            unsent.nbytes += len(frame)
            budget.queued += len(frame)
        for identity, unsent in list(self._unsent.items()):
            try:
                while unsent.frames:
                    self._socket.send_multipart([identity, unsent.frames[0]], zmq.NOBLOCK)
                    sent = len(unsent.frames.popleft())
                    unsent.nbytes -= sent
                    budget.queued -= sent
            except zmq.Again:
                if identity not in self._clients:
                    self._discard(identity)
                elif unsent.nbytes > _MAX_UNSENT_BYTES:
                    self._forget(identity, "slow", "it reads nothing")
                continue
            except zmq.ZMQError as error:
                self._forget(identity, "disconnected", f"its connection is gone ({error.strerror})")
            self._discard(identity)

    def _say_goodbye(self, identity: bytes, client: Client) -> None:
        for session in self._sessions.store.of_client(client):
            self._outbox.append(
                (identity, Failed(session.id, E_SHUTDOWN, "the receiver is stopping"))
            )
        self._sessions.drop_client(client, "shutdown")
        self._outbox.append((identity, Rejected(E_SHUTDOWN, "the receiver is stopping")))
