"""A hand-written client of the receiver: what vLLM's side does, block by block."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import zmq

from mlx_receiver.decode.model import ModelSource
from mlx_receiver.receiver import Receiver
from mlx_receiver.settings import Settings
from mlx_receiver.transports.tcp import TcpTransport
from mlx_receiver.transports.transport import Sender
from mlx_receiver.wire import keys
from mlx_receiver.wire.codec import decode_receiver, encode
from mlx_receiver.wire.frames import Header, Kind
from mlx_receiver.wire.handshake import Introduction
from mlx_receiver.wire.layout import CacheLayout, layout_from_config
from mlx_receiver.wire.messages import (
    Cancel,
    Complete,
    DataTicket,
    Decoded,
    Failed,
    Open,
    Opened,
    Ping,
    Refused,
    Rejected,
    Start,
    Status,
    Step,
    Welcome,
)
from mlx_receiver.wire.sampling import Sampling

#: Options of a receiver for this machine alone.
HERE: dict[str, Any] = {"host": "127.0.0.1", "discovery": False}

_sessions = itertools.count(1)


@dataclass
class Prefilled:
    """A prompt's K and V ``[layers][2]`` of ``[heads, tokens, head_dim]`` carriers and its text."""

    prompt: list[int]
    planes: list[list[np.ndarray]]
    dtype: str
    tokens: list[int]

    @property
    def first(self) -> int:
        return self.tokens[0]


def layout_of(source: ModelSource, dtype: str) -> CacheLayout:
    """What vLLM would say of its cache of that model."""
    return layout_from_config(source.config, dtype)


class FakeVllm:
    """One control connection and one data connection."""

    def __init__(
        self,
        receiver: Receiver,
        *,
        token: str = "",
        kv_dtype: str = "float32",
        host: str = "127.0.0.1",
        known: keys.ClientKeys | None = None,
        weights: str = "",
    ) -> None:
        """``known`` are its keys, where they are not the token's; ``weights`` the fingerprint of
        its model's, "" where it does not know that."""
        self.weights = weights
        self.receiver = receiver
        self.host = host
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        # One that the receiver does not know has nobody to send to.
        self.socket.setsockopt(zmq.SNDTIMEO, 5000)
        keys.guard_client(self.socket, known or keys.of_token(token))
        self.socket.connect(f"tcp://{host}:{receiver.port}")
        self.kv_dtype = kv_dtype
        #: What the receiver has given this connection.
        self.ticket: DataTicket | None = None
        #: Messages not yet waited for; of a Step its entries.
        self.inbox: list[Any] = []
        self.largest_step = 0
        self.data: Sender | None = None
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._alive = threading.Thread(target=self._ping, daemon=True)

    def hello(self, seconds: float = 20.0, **changes: Any) -> Any:
        envelope = {name: changes.pop(name) for name in ("protocol", "payload") if name in changes}
        source = self.receiver.source
        layout = layout_of(source, self.kv_dtype)
        me = Introduction(source.signature, layout, "test", fingerprint=self.weights)
        hello = msgspec.structs.replace(me, **changes).hello()
        self.send(msgspec.structs.replace(hello, **envelope))
        answer = self.wait(lambda m: isinstance(m, Welcome | Rejected), seconds)
        if isinstance(answer, Welcome):
            self.ticket = answer.ticket
            self.data = self.connect_data()
            self._alive.start()
        return answer

    @property
    def ticket_id(self) -> str:
        assert self.ticket is not None
        return self.ticket.client

    def connect_data(self) -> Sender:
        assert self.ticket is not None
        endpoint = msgspec.structs.replace(self.receiver.data_endpoints[0], host=self.host)
        return TcpTransport().connect(endpoint, self.ticket, 5.0)

    def send(self, message: Any) -> None:
        self.send_raw(encode(message))

    def send_raw(self, *frames: bytes) -> None:
        with self._lock:
            self.socket.send_multipart(frames)

    def _ping(self) -> None:
        while not self._closing.wait(0.5):
            self.send(Ping(time.monotonic_ns()))

    def wait(self, matches: Callable[[Any], bool], seconds: float = 20.0) -> Any:
        """The first message, received already or not, for which ``matches`` is true."""
        until = time.monotonic() + seconds
        checked = 0
        while True:
            for index in range(checked, len(self.inbox)):
                if matches(self.inbox[index]):
                    return self.inbox.pop(index)
            checked = len(self.inbox)
            assert time.monotonic() < until, f"no such message within {seconds} s: {self.inbox}"
            with self._lock:
                if self.socket.poll(20):
                    message = decode_receiver(self.socket.recv())
                    if isinstance(message, Step):
                        self.inbox += message.decoded
                        self.largest_step = max(self.largest_step, len(message.decoded))
                    elif not isinstance(message, Status) or matches(message):
                        self.inbox.append(message)

    def open(self, prompt: list[int], sampling: Sampling, changes: Any = None) -> int:
        """Ask for a session and return its id; the answer is for ``opened``."""
        session = next(_sessions)
        message = Open(session, f"request-{session}", prompt, sampling)
        self.send(msgspec.structs.replace(message, **(changes or {})))
        return session

    def opened(self, session: int) -> Any:
        return self.wait(lambda m: isinstance(m, Opened | Refused) and m.session == session)

    def failed(self, session: int) -> Failed:
        return self.wait(lambda m: isinstance(m, Failed) and m.session == session)

    def complete(self, session: int) -> Complete:
        return self.wait(lambda m: isinstance(m, Complete) and m.session == session)

    def start(self, session: int, first_token: int) -> None:
        self.send(Start(session, first_token))

    def cancel(self, session: int) -> None:
        self.send(Cancel(session))

    def steps(self, session: int) -> Iterator[Any]:
        """The session's Decoded entries, up to the one that finishes it."""
        while True:
            decoded = self.wait(lambda m: isinstance(m, Decoded) and m.session == session)
            yield decoded
            if decoded.finish:
                return

    def tokens(self, session: int) -> list[int]:
        return [token for decoded in self.steps(session) for token in decoded.token_ids]

    def send_kv(self, session: int, kv: Prefilled, rng: random.Random | None = None) -> None:
        """Every block, in order whole planes or with ``rng`` in random rectangles and order."""
        assert self.data is not None
        for header, payload in blocks(session, kv, rng):
            self.data.send(header, [payload])

    def request(self, kv: Prefilled, sampling: Sampling, rng: random.Random | None = None) -> int:
        """A whole hand-off up to Start."""
        session = self.open(kv.prompt, sampling)
        assert isinstance(self.opened(session), Opened)
        self.send_kv(session, kv, rng)
        self.start(session, kv.first)
        return session

    def silence(self) -> None:
        """Stop saying that it lives."""
        self._closing.set()

    def close(self) -> None:
        self._closing.set()
        if self._alive.is_alive():
            self._alive.join()
        if self.data is not None:
            self.data.close()
        self.socket.close()
        self._context.term()


def block(
    session: int,
    kv: Prefilled,
    layer: int,
    plane: int,
    heads: slice,
    tokens: slice,
    changes: dict[str, Any] | None = None,
) -> tuple[Header, memoryview]:
    """One rectangle of a prompt's cache as a frame, with ``changes`` to its header."""
    data = np.ascontiguousarray(kv.planes[layer][plane][heads, tokens])
    payload = memoryview(data).cast("B")
    fields: dict[str, Any] = dict(
        kind=Kind.BLOCK,
        session=session,
        payload_bytes=payload.nbytes,
        layer=layer,
        part=plane,
        dtype=kv.dtype,
        head_start=heads.start,
        heads=data.shape[0],
        width=data.shape[2],
        token_start=tokens.start,
        tokens=data.shape[1],
    )
    return Header(**{**fields, **(changes or {})}), payload


def blocks(
    session: int, kv: Prefilled, rng: random.Random | None = None
) -> list[tuple[Header, memoryview]]:
    """The whole cache as frames."""
    found = []
    for layer, pair in enumerate(kv.planes):
        for plane in range(2):
            heads, tokens, _ = pair[plane].shape
            for h in _cuts(heads, rng):
                for t in _cuts(tokens, rng):
                    found.append(block(session, kv, layer, plane, h, t))
    if rng is not None:
        rng.shuffle(found)
    return found


def _cuts(length: int, rng: random.Random | None) -> list[slice]:
    inner = sorted(rng.sample(range(1, length), min(length - 1, rng.randrange(4)))) if rng else []
    edges = [0, *inner, length]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


@contextmanager
def started(model: Path, **options: Any) -> Iterator[Receiver]:
    """A receiver on free ports, without HTTP unless it is asked for. It keeps nothing of earlier
    texts unless that is asked for: ``FakeVllm`` sends whole caches. Nor does it measure itself."""
    settings = {**HERE, "port": 0, "http_port": None, "kv_memory": 1 << 28}
    settings |= {"prompt_cache": False, "profile": False, **options}
    with Receiver(Settings(model=str(model), **settings)) as receiver:
        yield receiver


@contextmanager
def connected(receiver: Receiver, **options: Any) -> Iterator[FakeVllm]:
    """A welcomed client."""
    client = FakeVllm(receiver, **options)
    try:
        assert isinstance(client.hello(), Welcome)
        yield client
    finally:
        client.close()
