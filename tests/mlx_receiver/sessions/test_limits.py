"""What one peer can take from the others: nothing. Each time a legitimate request is beside it."""

from __future__ import annotations

import ctypes
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from mlx_receiver.decode.local import LocalJob, generate_tokens
from mlx_receiver.receiver import Receiver
from mlx_receiver.wire import keys
from mlx_receiver.wire.codec import client_decoder, decode_client, encode
from mlx_receiver.wire.frames import Header, Kind
from mlx_receiver.wire.messages import (
    Cancel,
    Failed,
    Opened,
    Ping,
    Refused,
    Rejected,
    Start,
    Status,
    WireError,
)
from mlx_receiver.wire.sampling import Sampling
from tests.mlx_receiver.client import FakeVllm, block, connected, started
from tests.mlx_receiver.conftest import Prefill
from tests.mlx_receiver.sessions.test_refusals import opened, raw_data
from tests.waiting import eventually

GREEDY = Sampling(max_tokens=8, temperature=0.0)
LONG = Sampling(max_tokens=4000, temperature=0.0)


@pytest.fixture
def beside(receiver: Receiver, prefill: Prefill) -> Iterator[None]:
    """A response that is under way from before until after, and must be whole."""
    kv = prefill(255, decode=60)
    with connected(receiver) as other:
        session = other.request(kv, msgspec.structs.replace(GREEDY, max_tokens=60))
        next(other.steps(session))
        yield
        assert other.tokens(session) == kv.tokens[2:]


def test_strangers_cannot_use_up_connections(receiver: Receiver, beside: None) -> None:
    port = int(receiver.address.rpartition(":")[2])
    with ExitStack() as stack:
        idle = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(100)
        ]
        until = time.monotonic() + 3  # the handshake may take 5 s

        def closed(sock: socket.socket) -> bool:
            sock.settimeout(max(0.001, until - time.monotonic()))
            try:
                while sock.recv(1000):
                    pass
            except ConnectionResetError:
                pass
            except TimeoutError:
                return False
            return True

        # The oldest give way, and one that has the keys is let in.
        assert all(closed(sock) for sock in idle[:30])
        with connected(receiver):
            pass


def test_who_takes_a_clients_name_gets_nothing_of_it(
    receiver: Receiver, prefill: Prefill, beside: None
) -> None:
    with connected(receiver) as client:
        session = opened(client, prefill(17).prompt)
        names = [name for name, c in receiver.control._clients.items() if c.id == client.ticket_id]
        with client._context.socket(zmq.DEALER) as thief:
            keys.guard_client(thief, keys.of_token(""))
            thief.linger = 0
            thief.routing_id = names[0]
            thief.connect(f"tcp://{receiver.address}")
            thief.send(encode(Cancel(session)))
            client.send(Ping(5))
            assert client.wait(lambda m: isinstance(m, Status) and m.ping_ns == 5)
            assert not thief.poll(300)
            assert receiver.store.get(session) is not None


def test_the_next_connections_name_cannot_be_known(tiny_llama_path: Path) -> None:
    """Whoever knows it ends the process: libzmq asserts that it is free."""
    names = []
    for _ in range(2):
        ctypes.CDLL(None).srand(1)
        with started(tiny_llama_path) as receiver, connected(receiver):
            names += receiver.control._clients
    assert names[0] != names[1]


def test_a_second_hello_changes_nothing(client: FakeVllm, prefill: Prefill, beside: None) -> None:
    kv = prefill(17)
    session = opened(client, kv.prompt)
    assert isinstance(client.hello(), Rejected)
    client.send_kv(session, kv)
    client.start(session, kv.first)
    assert [kv.first, *client.tokens(session)] == kv.tokens


def test_an_open_that_cannot_be_read_is_refused_by_itself(client: FakeVllm) -> None:
    sampling = msgspec.structs.replace(GREEDY, allowed_token_ids=[1] * 50_000)
    session = client.open([5, 6], sampling)
    refused = client.opened(session)
    assert isinstance(refused, Refused)
    assert "allowed_token_ids" in refused.reason


def test_no_message_takes_long_to_read() -> None:
    """Of a model with 131,072 tokens; the whole control channel waits while one is read."""
    decoder = client_decoder(131_072, 49_152)
    size = 131_072 * 5 + (1 << 20)
    unknown = b"\x83\xa1x\xdd" + (size - 60).to_bytes(4, "big") + b"\x90" * (size - 60)
    frames = {
        "nested": b"\x91" * size,
        "unknown": unknown + b"\xa4type\xa4ping\xa7sent_ns\x01",
        "prompt": _open([1] * (size - 200)),
        "allowed": _open([1], allowed_token_ids=[1] * (size - 200)),
        "bias": _open([1], logit_bias={i: 1.0 for i in range(49_152)}),
        "largest": _open(
            [40_000] * 131_072,
            allowed_token_ids=[300] * 49_152,
            logit_bias={i: 1.0 for i in range(8192)},
        ),
    }
    for name, frame in frames.items():
        seconds = []
        for _ in range(3):
            began = time.thread_time()
            with suppress(WireError):
                decode_client(frame, decoder)
            seconds.append(time.thread_time() - began)
        assert min(seconds) < 0.05, (name, seconds)


def _open(prompt: list[int], **sampling: Any) -> bytes:
    message = {
        "type": "open",
        "session": 1,
        "request_id": "x",
        "prompt_token_ids": prompt,
        "sampling": {"max_tokens": 5, **sampling},
    }
    return msgspec.msgpack.encode(message)


def test_a_client_that_reads_nothing_is_let_go(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch, beside: None
) -> None:
    monkeypatch.setattr("mlx_receiver.control.server._MAX_UNSENT_BYTES", 50_000)
    with connected(receiver) as client:
        client.silence()
        client._alive.join()
        queued = 0
        until = time.monotonic() + 30
        while client.ticket_id in receiver.store._keys and time.monotonic() < until:
            for _ in range(25):
                client.send(Ping(1))
            queued = max(queued, receiver.store.budget.queued)
        assert client.ticket_id not in receiver.store._keys
        assert 0 < queued < 1 << 20
        assert eventually(lambda: receiver.store.budget.queued == 0)


def test_a_client_that_leaves_is_no_warning(
    receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "mlx_receiver.control.server")
    with connected(receiver) as client:
        ticket = client.ticket_id
    assert eventually(lambda: ticket not in receiver.store._keys)
    assert [r.message for r in caplog.records if r.levelname != "INFO"] == []
    assert "client test left" in caplog.text


def test_other_clients_blocks_attaches_and_errors_reach_no_session(
    receiver: Receiver, client: FakeVllm, prefill: Prefill, beside: None
) -> None:
    kv = prefill(17)
    session = opened(client, kv.prompt)
    header, payload = block(session, kv, 0, 0, slice(0, 2), slice(0, 17))
    wrong, _ = block(session, kv, 0, 0, slice(0, 2), slice(0, 17), {"layer": 99})
    with connected(receiver) as other:
        assert other.data is not None
        other.data.send(header, [memoryview(bytes(payload.nbytes))])
        other.data.send(wrong, [payload])
        other.data.send(Header(Kind.ATTACH, session, 0))
        assert not eventually(lambda: any(r.accepted for r in other.data.replies()), 0.3)
    client.send_kv(session, kv)
    client.start(session, kv.first)
    assert [kv.first, *client.tokens(session)] == kv.tokens


def test_one_clients_waiting_attaches_are_its_own(
    receiver: Receiver, client: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_receiver.sessions.store._MAX_WAITING", 3)
    with connected(receiver) as other:
        assert other.data is not None
        for session in range(5000, 5004):
            other.data.send(Header(Kind.ATTACH, session, 0))
        replies: list[Any] = []
        assert eventually(lambda: bool(replies.extend(other.data.replies()) or replies))
        assert "too many workers" in replies[0].reason
        assert client.data is not None
        client.data.send(Header(Kind.ATTACH, opened(client, [5, 6]), 0))
        assert eventually(lambda: any(r.accepted for r in client.data.replies()))


def test_sessions_to_which_nothing_comes_are_given_up(
    client: FakeVllm, monkeypatch: pytest.MonkeyPatch, beside: None
) -> None:
    monkeypatch.setattr("mlx_receiver.sessions.overdue.IDLE_SECONDS", 0.3)
    session = opened(client, [5, 6])
    assert "no block and no Start came" in client.failed(session).reason


def test_the_last_places_are_for_clients_without_any(tiny_llama_path: Path) -> None:
    with (
        started(tiny_llama_path, max_sessions=4) as receiver,
        connected(receiver) as greedy,
        connected(receiver) as modest,
    ):
        for _ in range(3):
            opened(greedy, [5, 6])
        refused = greedy.opened(greedy.open([5, 6], GREEDY))
        assert "1 of 4 are kept for other clients" in refused.reason
        opened(modest, [5, 6])


def test_waiting_for_room_in_the_batch_is_queued(tiny_llama_path: Path, prefill: Prefill) -> None:
    kv = prefill(17)
    with started(tiny_llama_path, max_batch=1) as receiver, connected(receiver) as client:
        first = client.request(kv, LONG)
        next(client.steps(first))
        second = client.request(kv, GREEDY)
        client.complete(second)

        def states() -> dict[int, str]:
            client.send(Ping(9))
            status = client.wait(lambda m: isinstance(m, Status) and m.ping_ns == 9)
            return {progress.session: progress.state for progress in status.sessions}

        assert eventually(lambda: states() == {first: "decoding", second: "queued"})
        client.cancel(first)
        assert [kv.first, *client.tokens(second)] == kv.tokens


def test_a_complete_sessions_map_is_let_go(
    client: FakeVllm, prefill: Prefill, beside: None
) -> None:
    kv = prefill(257)
    store = client.receiver.store
    session = opened(client, kv.prompt)
    known = store.get(session)
    assert known is not None
    whole = known.reservation.nbytes
    cells = known.layout.cells(257)
    assert cells == 4 * 2 * 2 * 257
    client.send_kv(session, kv)
    client.complete(session)
    assert known.reservation.nbytes == whole - cells
    marks = [marks for layer in known._coverage._parts for marks in layer]
    assert all(m.base is not None and m.base.nbytes == 1 for m in marks)
    client.send_kv(session, kv)  # once more: compared as before
    client.start(session, kv.first)
    assert [kv.first, *client.tokens(session)] == kv.tokens
    assert eventually(lambda: known.reservation.nbytes == 0)
    kept = store.recent()[-1]
    assert kept.tokens == 257
    assert not hasattr(kept, "prompt_token_ids")


def test_memory_that_is_still_written_counts(
    client: FakeVllm, prefill: Prefill, beside: None
) -> None:
    kv = prefill(17)
    session = opened(client, kv.prompt)
    known = client.receiver.store.get(session)
    assert known is not None
    header, payload = block(session, kv, 0, 0, slice(0, 2), slice(0, 17))
    torn = raw_data(client)
    torn.sendall(header.pack() + payload[: payload.nbytes // 2])
    time.sleep(0.2)
    client.cancel(session)
    assert eventually(lambda: client.receiver.store.get(session) is None)
    time.sleep(0.2)
    assert known.reservation.nbytes > 0
    torn.close()
    assert eventually(lambda: known.reservation.nbytes == 0)


def test_local_prompts_and_growth_stay_within_the_budget(
    tiny_llama_path: Path, prefill: Prefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_receiver.caches.memory.HEADROOM", 1)
    kv = prefill(17)
    with (
        started(tiny_llama_path, kv_memory=600 << 10) as receiver,
        connected(receiver) as client,
    ):
        engine = receiver.engine
        # 2,048 bytes a token: there is room for 256.
        with pytest.raises(WireError, match="need 6 MiB of KV memory"):
            generate_tokens(engine, [5] * 3000, GREEDY)
        assert receiver.store.reserved_bytes == 0
        session = client.request(kv, LONG)
        next(client.steps(session))
        failed = client.failed(session)
        assert (failed.code, "KV memory is full" in failed.reason) == ("capacity", True)
        job = LocalJob(engine, kv.prompt, LONG)
        with pytest.raises(WireError, match="KV memory is full"):
            while True:
                job.next(20)
        assert eventually(lambda: receiver.store.reserved_bytes == 0)
        assert generate_tokens(engine, kv.prompt, GREEDY) == kv.tokens


def test_a_receiver_that_cannot_decode_says_so_and_recovers(
    tiny_llama_path: Path, prefill: Prefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_receiver.decode.batch import Float32Logits

    monkeypatch.setattr("mlx_receiver.decode.engine._PROBE_SECONDS", 0.1)
    kv = prefill(17)

    def explode(*_: object, **__: object) -> Any:
        raise RuntimeError("the GPU has gone")

    with started(tiny_llama_path) as receiver, connected(receiver) as client:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Float32Logits, "__call__", explode)
            session = client.request(kv, GREEDY)
            assert "the GPU has gone" in client.failed(session).reason
            assert eventually(lambda: receiver.status == "failing")
            client.send(Ping(3))
            status = client.wait(lambda m: isinstance(m, Status) and m.ping_ns == 3)
            assert not status.accepting
            refused = client.opened(client.open(kv.prompt, GREEDY))
            assert "cannot decode: " in refused.reason
            with pytest.raises(WireError, match="cannot decode"):
                generate_tokens(receiver.engine, kv.prompt, GREEDY)
        assert eventually(lambda: receiver.status == "ok")
        session = client.request(kv, GREEDY)
        assert [kv.first, *client.tokens(session)] == kv.tokens


def test_messages_in_the_wrong_place_are_answered(client: FakeVllm) -> None:
    client.send(Start(424242, 5))
    assert client.wait(lambda m: isinstance(m, Failed)).code == "session"
    assert isinstance(client.opened(client.open([5], GREEDY)), Opened)
