"""The receiver's sessions under every order of events that clients, workers and time can give.

A real store, decode engine and allocator with a tiny model, without sockets: clients call what the
control and data channels call. Whatever the order, a call succeeds or raises WireError, each client
hears of its own sessions only and in the protocol's order, and in the end all memory is free.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
from typing import Any

import numpy as np
from hypothesis import strategies as st

from mlx_receiver.receiver import Receiver
from mlx_receiver.sessions.client import Client
from mlx_receiver.settings import Settings
from mlx_receiver.wire import keys
from mlx_receiver.wire import messages as m
from mlx_receiver.wire.frames import Header, Kind
from mlx_receiver.wire.handshake import Introduction
from mlx_receiver.wire.layout import layout_from_config
from mlx_receiver.wire.quantised import row_bytes
from mlx_receiver.wire.sampling import Sampling
from tests.conftest import cached_model
from tests.models import MODELS
from tests.waiting import eventually

CLIENTS, PLACES = 2, 4

_session = st.integers(0, PLACES - 1)
_client = st.integers(0, CLIENTS - 1)
_span = st.tuples(st.integers(0, 20), st.integers(1, 20))

#: One event: what happens, whose and on which of the sessions that were opened before.
event = st.one_of(
    st.tuples(
        st.just("open"), _client, st.sampled_from([1, 3, 17]), st.sampled_from([1, 2, 5]),
        st.sampled_from(["", "", "", "unclaimed", "proof", "both"]), st.sampled_from([None, 3, 70]),
        st.sampled_from(["raw", "raw", "q8", "q4"]),
    ),
    st.tuples(st.just("reopen"), _client, _session),
    st.tuples(st.just("blocks"), _client, _session),
    st.tuples(
        st.just("block"), _client, _session, st.integers(0, 1), st.integers(0, 1), _span,
        st.sampled_from(["right", "right", "other", "torn", "dtype", "codec"]),
    ),
    st.tuples(st.just("start"), _client, _session, st.sampled_from([3, 50, 99])),
    st.tuples(st.just("start"), _client, _session, st.sampled_from([3, 50, 99])),
    st.tuples(st.just("cancel"), _client, _session),
    st.tuples(st.just("attach"), _client, _session),
    st.tuples(st.just("detach"), _client, _session),
    st.tuples(st.just("status"), _client),
    st.tuples(st.just("claim"), _session, st.booleans()),
    st.tuples(st.just("drop"), _client),
    st.tuples(st.just("sweep")),
    st.tuples(st.just("settle")),
)  # fmt: skip

events = st.lists(event, min_size=10, max_size=60)


@functools.cache
def receiver() -> Receiver:
    """One receiver for all examples; it serves until the process ends. Then it is stopped: Python
    ends a thread that comes back from MLX after it, which C++ takes for a failure and aborts."""
    model = cached_model("fuzz-llama-64", MODELS["fuzz-llama-64"])
    settings = Settings(
        model=str(model), host="127.0.0.1", discovery=False, port=0, http_port=None,
        kv_memory=16 << 20, max_sessions=6, max_batch=2, profile=False,
    )  # fmt: skip
    started = Receiver(settings)
    atexit.register(started.stop)
    started.start()
    assert started.wait_ready(120)
    return started


class _Machine:
    def __init__(self) -> None:
        self.receiver = receiver()
        self.store, self.sessions = self.receiver.store, self.receiver.sessions
        #: Every message a client got, in order; the last one is for whoever claims over HTTP.
        self.heard: list[list[m.ReceiverMessage]] = [[] for _ in range(CLIENTS + 1)]
        self.clients = [self._welcome(index) for index in range(CLIENTS)]
        self.opened: list[tuple[int, m.Open]] = []
        self.claimed: set[int] = set()

    def _welcome(self, index: int) -> Client:
        ticket = keys.new_ticket()
        self.store.admit(ticket)
        layout = layout_from_config(self.receiver.source.config, "float32")
        post, source = self.heard[index].append, self.receiver.source
        said = Introduction(source.signature, layout, f"fuzz {index}")
        return Client(
            ticket.client, said.client, layout, post, self.sessions, source.max_tokens, said
        )

    def run(self, drawn: list[tuple[Any, ...]]) -> None:
        for name, *arguments in drawn:
            with contextlib.suppress(m.WireError):  # a refusal is an answer
                getattr(self, f"do_{name}")(*arguments)
        for client in self.clients:
            self.sessions.drop_client(client, "fuzzed")
        for session in self.store.sessions():
            self.store.end(session, "fuzzed")  # those that were claimed
        assert eventually(lambda: self.store.reserved_bytes == 0, 20, pause=0.001), (
            f"{self.store.reserved_bytes} bytes are still reserved after {drawn}"
        )
        assert eventually(lambda: not self.receiver.engine.decoding, 20, pause=0.001)
        for index in range(CLIENTS):
            self._check_order(index)

    def _of(self, place: int) -> tuple[int, m.Open]:
        if not self.opened:
            raise m.WireError(m.E_SESSION, "none was opened")
        return self.opened[-1 - place % len(self.opened)]

    # --- events ---------------------------------------------------------------------------------

    def do_open(
        self, client: int, tokens: int, limit: int, kind: str, eos: int | None, codec: str
    ) -> None:
        message = m.Open(
            session=_next_session(),
            request_id="fuzz",
            prompt_token_ids=[(7 * i + tokens) % 100 for i in range(tokens)],
            sampling=Sampling(max_tokens=limit, temperature=0.0, eos_token_id=eos),
            unclaimed=kind in ("unclaimed", "both"),
            proof=kind in ("proof", "both"),
            codec=codec,
        )
        self.sessions.open(self.clients[client], message)
        self.opened.append((client, message))

    def do_reopen(self, client: int, place: int) -> None:
        _, message = self._of(place)
        if self.store.get(message.session) is None:
            return  # its number is free again, which ``_check_order`` does not follow
        self.sessions.open(self.clients[client], message)

    def do_blocks(self, client: int, place: int) -> None:
        owner, opened = self._of(place)
        eventually(lambda: m.Opened(opened.session) in self.heard[owner], 0.2, pause=0.001)
        for layer in range(2):
            for part in range(2):
                self.do_block(client, place, layer, part, (0, 100), "right")

    def do_block(
        self, client: int, place: int, layer: int, part: int, span: tuple[int, int], what: str
    ) -> None:
        _, opened = self._of(place)
        loaded = self.receiver.engine.loaded
        assert loaded is not None
        shape = loaded.cache.layout.layers[layer].parts[part]
        start = span[0] if span[0] < len(opened.prompt_token_ids) else 0
        count = min(span[1], len(opened.prompt_token_ids) - start)
        dtype = "bfloat16" if what == "dtype" else "float32"
        others = {"raw": "q8", "q8": "q4", "q4": "raw"}
        codec = others[opened.codec] if what == "codec" else opened.codec
        header = Header(
            Kind.BLOCK,
            opened.session,
            shape.heads * count * row_bytes(codec, dtype, shape.width),
            layer,
            part,
            dtype,
            heads=shape.heads,
            width=shape.width,
            token_start=start,
            tokens=count,
            codec=codec,
        )
        sender = self.clients[client].id
        try:
            landing = self.store.landing(sender, header)
            if what == "torn":
                landing.abort()
                return
            for buffer in landing.buffers:
                np.frombuffer(buffer, np.uint8)[:] = 1 if what == "other" else 0
            landing.commit()
        except m.WireError as error:
            self.store.rejected(sender, header, error.code, error.reason)

    def do_start(self, client: int, place: int, token: int) -> None:
        self.sessions.start(self.clients[client], m.Start(self._of(place)[1].session, token))

    def do_cancel(self, client: int, place: int) -> None:
        self.sessions.cancel(self.clients[client], m.Cancel(self._of(place)[1].session))

    def do_attach(self, client: int, place: int) -> None:
        self.store.attach(self.clients[client].id, self._of(place)[1].session, lambda reply: None)

    def do_detach(self, client: int, place: int) -> None:
        self.store.detached(self.clients[client].id, self._of(place)[1].session)

    def do_status(self, client: int) -> None:
        status = self.sessions.status(self.clients[client], 1)
        assert 0 <= status.free_bytes <= self.store.budget_bytes
        mine = {opened.session for owner, opened in self.opened if owner == client}
        assert {progress.session for progress in status.sessions} <= mine

    def do_claim(self, place: int, right: bool) -> None:
        _, opened = self._of(place)
        prompt = opened.prompt_token_ids if right else [*opened.prompt_token_ids, 1]
        sampling = Sampling(max_tokens=3, temperature=0.0)
        client = self.sessions.claim(opened.session, prompt, sampling, self.heard[-1].append)
        assert right and opened.unclaimed and not opened.proof
        self.claimed.add(opened.session)
        self.sessions.start(client, m.Start(opened.session, 5))

    def do_drop(self, client: int) -> None:
        self.sessions.drop_client(self.clients[client], "left")
        self.clients[client] = self._welcome(client)

    def do_sweep(self) -> None:
        self.store.sweep()

    def do_settle(self) -> None:
        eventually(
            lambda: not (self.receiver.engine.decoding or self.receiver.engine.waiting),
            5,
            pause=0.001,
        )

    # --- what was heard -------------------------------------------------------------------------

    def _check_order(self, index: int) -> None:
        """Each session's messages come in the protocol's order, and to its client alone."""
        mine = {opened.session: opened for owner, opened in self.opened if owner == index}
        phase: dict[int, str] = {}
        produced: dict[int, int] = {}
        for message in self.heard[index]:
            for part in message.decoded if isinstance(message, m.Step) else [message]:
                session = part.session  # type: ignore[union-attr]
                assert session in mine, f"client {index} heard of another's session: {part}"
                before = phase.get(session, "asked")
                assert before != "over", f"{part} after the session's end"
                match part:
                    case m.Opened():
                        assert before == "asked"
                        phase[session] = "opened"
                    case m.Complete():
                        assert before in ("opened", "asked")
                        phase[session] = "complete"
                    case m.Proven():
                        assert before == "complete" and mine[session].proof, part
                        phase[session] = "over"
                    case m.Decoded():
                        assert before in ("complete", "decoding") and not mine[session].proof, part
                        count = produced.get(session, 0)
                        assert part.position == count + 1 or not part.token_ids
                        produced[session] = count + len(part.token_ids)
                        assert 1 + produced[session] <= mine[session].sampling.max_tokens
                        phase[session] = "over" if part.finish else "decoding"
                    case m.Failed():
                        phase[session] = "over"


_numbers = iter(range(1, 1 << 62))


def _next_session() -> int:
    return next(_numbers)


def sessions(drawn: list[tuple[Any, ...]]) -> int:
    """Run the events; one case each."""
    _Machine().run(drawn)
    return len(drawn)
