"""A receiver that misbehaves: the real wire, a real data port, and no model.

    python -m tests.lying_receiver PORT MODEL ANSWERS [--host ADDRESS] [--no-data] [--hold SECONDS]

ANSWERS is a JSON file of ``[lie, prompt, tokens]`` entries, ``tokens`` being the right answer to
the prompt. A session whose prompt is there is served as the lie of that name says: ``honest`` gives
the right tokens, one every 10 ms, every other gives some of them before it lies, and ``any`` is a
random one of LIES. Each lie is a generator of what is sent next, or None for the next turn. With
``--no-data`` nobody listens where blocks should go. With ``--hold`` nobody lies until that long
after the latest session was opened: three lies open vLLM's circuit breaker, and no other one comes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from mlx_receiver.transports.tcp import TcpTransport
from mlx_receiver.transports.transport import Landing
from mlx_receiver.wire import codec
from mlx_receiver.wire import messages as m
from mlx_receiver.wire.frames import DataReply, Header
from mlx_receiver.wire.keys import control_keys, new_ticket
from mlx_receiver.wire.layout import layout_from_config
from mlx_receiver.wire.signature import signature_from_config

#: Prompt and output together; vLLM's own is longer.
CONTEXT = 300
TURN = 0.01


@dataclass
class Session:
    opened: m.Open
    lie: str
    tokens: list[int]
    need: int
    vocab_size: int
    kv_bytes: int = 0
    started: bool = False
    cancelled: bool = False
    progress: Callable[[], m.Progress] | None = None
    script: Iterator[Sent] = field(default_factory=lambda: iter(()))

    @property
    def id(self) -> int:
        return self.opened.session

    def step(self, position: int, *tokens: int, **fields: object) -> m.Step:
        tokens = tokens or (self.tokens[position],)
        return m.Step([m.Decoded(self.id, position, list(tokens), **fields)])  # type: ignore[arg-type]

    def upto(self, count: int) -> Iterator[Sent]:
        """All that is right, up to ``count`` output tokens, vLLM's own included."""
        yield m.Opened(self.id)
        while self.kv_bytes < self.need:
            yield None
        yield m.Complete(self.id, self.kv_bytes)
        while not self.started:
            yield None
        yield from self.steps(count)

    def steps(self, count: int) -> Iterator[Sent]:
        """The receiver's own tokens, one a turn."""
        for position in range(1, count):
            last = position + 1 == len(self.tokens)
            yield self.step(position, finish="length" if last else "")
            yield None

    def says(self, state: str, kv_bytes: int, tokens: int = 0) -> None:
        self.progress = lambda: m.Progress(self.id, state, kv_bytes, tokens)  # type: ignore[arg-type]


Sent = m.ReceiverMessage | bytes | list[bytes] | None


def honest(s: Session) -> Iterator[Sent]:
    yield from s.upto(len(s.tokens))


def beyond_the_limit(s: Session) -> Iterator[Sent]:
    yield from s.upto(3)
    yield s.step(3, *s.tokens[3:], *[7] * 20)
    yield m.Failed(s.id, "internal", "no more")


def silent_at_the_limit(s: Session) -> Iterator[Sent]:
    yield from s.upto(3)
    yield s.step(3, *s.tokens[3:])


def wrong_position(s: Session) -> Iterator[Sent]:
    yield from s.upto(3)
    yield s.step(5)


def same_position(s: Session) -> Iterator[Sent]:
    yield from s.upto(3)
    yield s.step(2)


def empty_steps(s: Session) -> Iterator[Sent]:
    yield from s.upto(3)
    while True:
        yield m.Step([m.Decoded(s.id, 3, [])])


def stops_without_reason(s: Session) -> Iterator[Sent]:
    yield from s.upto(3)
    yield s.step(3, finish="stop")


def invented_stop_reason(s: Session) -> Iterator[Sent]:
    yield from s.upto(len(s.tokens) - 1)
    yield s.step(len(s.tokens) - 1, finish="length", stop_reason=5)


def early_length(s: Session) -> Iterator[Sent]:
    yield from s.upto(3)
    yield s.step(3, finish="length")


def unasked_logprobs(s: Session) -> Iterator[Sent]:
    yield from s.upto(3)
    yield s.step(3, logprobs=[m.Logprobs([s.tokens[3]], [-1.0], 1)])


def two_parts_of_a_step(s: Session) -> Iterator[Sent]:
    yield from s.upto(3)
    yield m.Step([m.Decoded(s.id, p, [s.tokens[p]]) for p in (3, 4)])


def before_start(s: Session) -> Iterator[Sent]:
    yield m.Opened(s.id)
    yield s.step(0)


def opened_twice(s: Session) -> Iterator[Sent]:
    yield m.Opened(s.id)
    yield m.Opened(s.id)


def completes_unopened(s: Session) -> Iterator[Sent]:
    yield m.Complete(s.id, s.need)


def invented_bytes(s: Session) -> Iterator[Sent]:
    yield m.Opened(s.id)
    yield m.Complete(s.id, 2**62)


def refuses_late(s: Session) -> Iterator[Sent]:
    yield from s.upto(3)
    yield m.Refused(s.id, "capacity", "\n\x1b[31mINFO all is well\n" * 100)


def fails(s: Session) -> Iterator[Sent]:
    yield from s.upto(3)
    yield m.Failed(s.id, "internal", "\n" * 4000)


def creeps(s: Session) -> Iterator[Sent]:
    """Never complete, but every Status has some bytes more."""
    yield m.Opened(s.id)
    began = time.monotonic()
    s.progress = lambda: m.Progress(s.id, "receiving", int(time.monotonic() - began), 0)


def counts_tokens(s: Session) -> Iterator[Sent]:
    """Every Status has some tokens more, but none comes."""
    yield from s.upto(3)
    began = time.monotonic()
    s.progress = lambda: m.Progress(
        s.id, "decoding", s.need, min(s.opened.sampling.max_tokens, int(time.monotonic() - began))
    )


def shrinks(s: Session) -> Iterator[Sent]:
    yield from s.upto(3)
    s.says("decoding", s.need - 1)


def queues(s: Session) -> Iterator[Sent]:
    yield from s.upto(1)
    s.says("queued", s.need)


def queues_off_and_on(s: Session) -> Iterator[Sent]:
    yield from s.upto(1)
    while True:
        for state in ("queued", "decoding"):
            s.says(state, s.need)
            for _ in range(30):
                yield None


def queues_a_while(s: Session) -> Iterator[Sent]:
    """Legitimate: for longer than a stall may last."""
    yield from s.upto(1)
    s.says("queued", s.need)
    until = time.monotonic() + 4
    while time.monotonic() < until:
        yield None
    s.progress = None
    yield from s.steps(len(s.tokens))


def context_is_full(s: Session) -> Iterator[Sent]:
    """Legitimate: this receiver's context is shorter than vLLM's."""
    last = CONTEXT - len(s.opened.prompt_token_ids) - 1
    yield from s.upto(last)
    yield s.step(last, finish="length")


def floods(s: Session) -> Iterator[Sent]:
    """A thousand messages a turn that are none of the client's business, and nothing else."""
    yield from s.upto(2)
    strange = codec.encode(m.Step([m.Decoded(1, 1, [1])] * 100))
    while True:
        for _ in range(1000):
            yield strange
        yield None


def dawdles(s: Session) -> Iterator[Sent]:
    """The right tokens, slower and slower."""
    for turns, sent in enumerate(s.upto(len(s.tokens))):
        yield sent
        for _ in range(min(turns, 400)):
            yield None


# --- what ends the whole connection -----------------------------------------------------------


def token_beyond_the_vocabulary(s: Session) -> Iterator[Sent]:
    yield from s.upto(3)
    yield s.step(3, s.vocab_size)


def not_a_message(s: Session) -> Iterator[Sent]:
    yield from s.upto(3)
    yield b"\x81\xa4type\xa4step"


def several_parts(s: Session) -> Iterator[Sent]:
    yield from s.upto(3)
    yield [b"", b"", b""]


class Data:
    """A ``BlockSink``: notes how many bytes came, and keeps none."""

    def __init__(self, ticket: m.DataTicket, sessions: dict[int, Session]) -> None:
        self._ticket, self._sessions = ticket, sessions

    def data_key(self, client: str) -> bytes:
        assert client == self._ticket.client
        return self._ticket.key

    def attach(self, client: str, session: int, reply: Callable[[DataReply], None]) -> None:
        def later() -> None:
            while session not in self._sessions:
                time.sleep(TURN)
            reply(DataReply(session, True))

        threading.Thread(target=later, daemon=True).start()

    def detached(self, client: str, session: int) -> None: ...

    def landing(self, client: str, header: Header) -> Landing:
        def commit() -> None:
            self._sessions[header.session].kv_bytes += header.payload_bytes

        return Landing([memoryview(bytearray(header.payload_bytes))], commit)

    def rejected(self, client: str, header: Header, code: m.Code, reason: str) -> None: ...


#: What ``any`` is one of.
LIES = (
    beyond_the_limit, silent_at_the_limit, wrong_position, same_position, empty_steps,
    stops_without_reason, invented_stop_reason, early_length, unasked_logprobs,
    two_parts_of_a_step, before_start, opened_twice, completes_unopened, invented_bytes,
    refuses_late, fails, creeps, counts_tokens, shrinks, queues_off_and_on, floods, dawdles,
    token_beyond_the_vocabulary, not_a_message, several_parts,
)  # fmt: skip


def main() -> None:
    """Serve for ever."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("port", "model", "answers"):
        parser.add_argument(name)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--no-data", action="store_true")
    parser.add_argument("--hold", type=float, default=0.0)
    options = parser.parse_args()
    config = json.loads((Path(options.model) / "config.json").read_text())
    signature, layout = signature_from_config(config), layout_from_config(config, "float32")
    known = {tuple(prompt): (lie, tokens) for lie, prompt, tokens in json.loads(
        Path(options.answers).read_text())}  # fmt: skip
    socket = zmq.Context().socket(zmq.ROUTER)
    token = os.environ.get("MAC_DECODE_TOKEN", "")
    socket.curve_server = True
    socket.curve_secretkey = control_keys(token).receiver_secret
    socket.bind(f"tcp://{options.host}:{options.port}")
    sessions: dict[int, Session] = {}
    ticket = new_ticket()
    listener = TcpTransport().listen(options.host, 0, Data(ticket, sessions))
    port, nonce = listener.endpoint.port, listener.endpoint.nonce
    if options.no_data:
        listener.close()
    # Workers must not go where the receiver sends them.
    endpoint = m.Endpoint("tcp", "192.0.2.1", port, nonce)
    peer, latest = b"", 0.0
    while True:
        socket.poll(int(TURN * 1000))
        while socket.poll(0):
            peer, packed = socket.recv_multipart()
            match codec.decode_client(packed):
                case m.Hello():
                    welcome = m.Welcome("r", "liar", "none", [endpoint], ticket, CONTEXT, ["raw"])
                    socket.send_multipart([peer, codec.encode(welcome)])
                case m.Ping(pinged):
                    told = [s.progress() for s in list(sessions.values()) if s.progress]
                    status = m.Status(pinged, time.monotonic_ns(), True, 1 << 30, told)
                    socket.send_multipart([peer, codec.encode(status)])
                case m.Open() as opened:
                    prompt = opened.prompt_token_ids
                    lie, tokens = known.get(tuple(prompt), ("fails", [1] * 4))
                    need = layout.nbytes(len(prompt))
                    session = Session(opened, lie, tokens, need, signature.vocab_size)
                    script = random.choice(LIES) if lie == "any" else globals()[lie]
                    session.script = script(session)
                    sessions[session.id] = session
                    latest = time.monotonic()
                case m.Start(number):
                    sessions[number].started = True
                case m.Cancel(number):
                    sessions[number].cancelled = True
        for session in list(sessions.values()):
            if session.lie != "honest" and time.monotonic() - latest < options.hold:
                continue
            # What has been sent at once goes out in one turn.
            for _ in range(1001):
                sent = None if session.cancelled else next(session.script, None)
                if sent is None:
                    break
                if not isinstance(sent, list):
                    sent = [sent if isinstance(sent, bytes) else codec.encode(sent)]
                socket.send_multipart([peer, *sent])
                if session.script.gi_code is not floods.__code__:
                    break
            if session.cancelled:
                session.progress = None


if __name__ == "__main__":
    main()
