"""What must not be accepted is refused by name, and nobody else notices."""

from __future__ import annotations

import contextlib
import math
import random
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from mlx_receiver.receiver import Receiver
from mlx_receiver.settings import Settings
from mlx_receiver.transports.tcp import dial
from mlx_receiver.wire.frames import Header, Kind
from mlx_receiver.wire.layout import CacheLayout, LayerLayout
from mlx_receiver.wire.messages import (
    PROTOCOL_VERSION,
    Opened,
    Ping,
    Refused,
    Rejected,
    Status,
    Welcome,
)
from mlx_receiver.wire.sampling import Sampling
from tests.mlx_receiver.client import HERE, FakeVllm, block, blocks, connected, started
from tests.mlx_receiver.conftest import Prefill
from tests.waiting import eventually

GREEDY = Sampling(max_tokens=8, temperature=0.0)
LATER = PROTOCOL_VERSION + 1
HEADS, TOKENS = slice(0, 2), slice(0, 17)


@pytest.fixture
def bystander(receiver: Receiver, prefill: Prefill) -> Iterator[None]:
    """A request of another client that must finish whatever the test does."""
    kv = prefill(255)
    with connected(receiver) as other:
        session = other.request(kv, GREEDY)
        yield
        assert [kv.first, *other.tokens(session)] == kv.tokens


def opened(client: FakeVllm, prompt: list[int]) -> int:
    session = client.open(prompt, GREEDY)
    assert isinstance(client.opened(session), Opened)
    return session


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"layer": 4}, "layer 4.*the model has 4 layers"),
        ({"head_start": 1}, "heads 1..2.*the model has 2 KV heads"),
        ({"token_start": 5}, "tokens 5..21.*the prompt has 17 tokens"),
        ({"token_start": 2**32 - 1}, "the prompt has 17 tokens"),
        ({"width": 16, "tokens": 34}, "a row is of 16 numbers, the model's of 32"),
        ({"dtype": "float16", "width": 64}, "a row is of 64 numbers"),
        ({"dtype": "bfloat16", "tokens": 34}, "dtype is bfloat16, agreed was float32"),
        ({"checksum": 12345}, "checksum does not match"),
    ],
)
def test_a_block_that_does_not_fit_fails_its_session_only(
    client: FakeVllm, prefill: Prefill, bystander: None, changes: dict[str, Any], names: str
) -> None:
    kv = prefill(17)
    bad, good = opened(client, kv.prompt), opened(client, kv.prompt)
    header, payload = block(bad, kv, 0, 0, HEADS, TOKENS, changes)
    assert client.data is not None
    client.data.send(header, [payload])
    failed = client.failed(bad)
    assert failed.code == "block"
    assert_matches(names, failed.reason)
    # The same data connection goes on.
    client.send_kv(good, kv)
    client.start(good, kv.first)
    assert [kv.first, *client.tokens(good)] == kv.tokens


def test_conflicting_duplicate_names_the_place(
    client: FakeVllm, prefill: Prefill, bystander: None
) -> None:
    kv = prefill(17)
    session = opened(client, kv.prompt)
    header, payload = block(session, kv, 2, 1, HEADS, TOKENS)
    wrong = np.frombuffer(payload, np.uint32).reshape(2, 17, 32).copy()
    wrong[1, 9, 3] ^= 1
    assert client.data is not None
    client.data.send(header, [payload])
    client.data.send(header, [wrong.data.cast("B")])
    failed = client.failed(session)
    assert failed.code == "block"
    assert_matches("layer 2, values.*different bytes, first at head 1, token 9", failed.reason)


def test_a_hole_is_named_when_nothing_fills_it(
    client: FakeVllm, prefill: Prefill, bystander: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_receiver.sessions.overdue.STALL_SECONDS", 0.3)
    kv = prefill(17)
    session = opened(client, kv.prompt)
    assert client.data is not None
    for header, payload in blocks(session, kv):
        if (header.layer, header.part) != (3, 1):
            client.data.send(header, [payload])
    header, payload = block(session, kv, 3, 1, HEADS, slice(0, 11))
    client.data.send(header, [payload])
    client.start(session, kv.first)
    failed = client.failed(session)
    assert failed.code == "block"
    assert_matches("layer 3, values, head 0, tokens 11..16", failed.reason)


def test_a_broken_connection_leaves_its_place_to_another(
    client: FakeVllm, prefill: Prefill, bystander: None
) -> None:
    kv = prefill(17)
    session = opened(client, kv.prompt)
    header, payload = block(session, kv, 0, 0, HEADS, TOKENS)
    torn = raw_data(client)
    torn.sendall(header.pack() + payload[: payload.nbytes // 2])
    time.sleep(0.1)
    torn.close()
    client.send_kv(session, kv, random.Random(0))
    client.start(session, kv.first)
    assert [kv.first, *client.tokens(session)] == kv.tokens


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n" + b" " * 100,
        Header(Kind.BLOCK, 1, 10, heads=1, tokens=1, width=1).pack(),
        Header(Kind.REPLY, 1, 0).pack(),
        b"\xff" * 200,
    ],
)
def test_forged_frames_close_only_their_connection(
    client: FakeVllm, prefill: Prefill, bystander: None, garbage: bytes
) -> None:
    forged = raw_data(client)
    forged.sendall(garbage)
    forged.settimeout(5)
    # Closing with unread bytes resets the connection.
    with contextlib.suppress(ConnectionResetError):
        assert forged.recv(100) == b""
    forged.close()


def test_blocks_of_unknown_and_ended_sessions_are_drained(
    client: FakeVllm, prefill: Prefill
) -> None:
    kv = prefill(17)
    client.send_kv(987654321, kv)
    session = opened(client, kv.prompt)
    client.cancel(session)
    assert eventually(lambda: client.receiver.store.get(session) is None)
    client.send_kv(session, kv)
    again = opened(client, kv.prompt)
    client.send_kv(again, kv)
    client.start(again, kv.first)
    assert [kv.first, *client.tokens(again)] == kv.tokens


def test_attach_waits_for_the_open_and_gives_up(
    client: FakeVllm, prefill: Prefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_receiver.sessions.store.ATTACH_SECONDS", 1.0)
    kv = prefill(17)
    assert client.data is not None
    early = client.open(kv.prompt, GREEDY) + 1
    client.data.send(Header(Kind.ATTACH, early, 0))
    client.data.send(Header(Kind.ATTACH, 555, 0))
    time.sleep(0.1)
    assert opened(client, kv.prompt) == early
    replies = {}
    assert client.data is not None

    def both() -> bool:
        replies.update({reply.session: reply for reply in client.data.replies()})
        return len(replies) == 2

    assert eventually(both)
    assert replies[early].accepted
    assert not replies[555].accepted
    assert_matches("no such session", replies[555].reason)


def test_sessions_of_other_clients_cannot_be_touched(
    receiver: Receiver, client: FakeVllm, prefill: Prefill
) -> None:
    kv = prefill(17)
    session = opened(client, kv.prompt)
    with connected(receiver) as stranger:
        stranger.cancel(session)
        stranger.start(session, kv.first)
        assert stranger.failed(session).code == "session"
    client.send_kv(session, kv)
    client.start(session, kv.first)
    assert [kv.first, *client.tokens(session)] == kv.tokens


@pytest.mark.parametrize(
    ("changes", "code", "names"),
    [
        ({"prompt_token_ids": [49_152]}, "unsupported", "prompt_token_ids.0. is 49152, not below"),
        ({"prompt_token_ids": [5] * 8192}, "capacity", "8192 tokens"),
        ({"codec": "zip"}, "unsupported", "codec 'zip'"),
        ({"sampling": Sampling(max_tokens=4, presence_penalty=math.inf)}, "unsupported", "is inf"),
        (
            {"sampling": Sampling(max_tokens=4, min_tokens=4, eos_token_id=49_152)},
            "unsupported",
            "eos_token_id is 49152",
        ),
    ],
)
def test_opens_that_cannot_be_served(
    client: FakeVllm, changes: dict[str, Any], code: str, names: str
) -> None:
    session = client.open([5, 6], GREEDY, changes)
    refused = client.opened(session)
    assert isinstance(refused, Refused)
    assert refused.code == code
    assert_matches(names, refused.reason)


def test_a_session_id_in_use_is_refused(client: FakeVllm) -> None:
    session = opened(client, [5, 6])
    client.open([5, 6], GREEDY, {"session": session})
    assert_matches("exists already", client.opened(session).reason)
    client.cancel(session)


@pytest.mark.parametrize(
    ("changes", "code", "names"),
    [
        ({"protocol": 0}, "version", "upgrade vllm-mac-decode on the client's machine"),
        ({"protocol": 99}, "version", "upgrade vllm-mac-decode on the receiver's machine"),
        ({"payload": b""}, "protocol", "introduction cannot be read"),
        ({"payload": b"\x81\xa1x\x01" * 50}, "protocol", "introduction cannot be read"),
        ({"payload": b"\xc1", "protocol": LATER}, "version", f"{LATER}, this receiver {LATER - 1}"),
    ],
)
def test_hellos_that_are_rejected(
    receiver: Receiver, changes: dict[str, Any], code: str, names: str
) -> None:
    client = FakeVllm(receiver)
    rejected = client.hello(**changes)
    assert isinstance(rejected, Rejected)
    assert rejected.code == code
    assert_matches(names, rejected.reason)
    client.close()


def test_another_model_is_rejected_naming_each_difference(receiver: Receiver) -> None:
    source = receiver.source
    other = msgspec.structs.replace(source.signature, vocab_size=77)
    wide = msgspec.structs.replace(source.layout.layers[1].parts[1], width=128)
    kinds = list(source.layout.layers)
    kinds[1] = LayerLayout(kinds[1].kind, [kinds[1].parts[0], wide])
    kinds[3] = LayerLayout("latent", [wide])
    for layout, named in (
        (CacheLayout(kinds), "layer 1, values: width: 32 here, 128 there; "
                             "layer 3, kind: full here, latent there"),
        (CacheLayout(kinds[:2]), "layers: 4 here, 2 there"),
    ):  # fmt: skip
        client = FakeVllm(receiver)
        rejected = client.hello(signature=other, layout=layout)
        assert rejected.code == "model"
        assert_matches(f"vocab_size: 49152 here, 77 there; {named}", rejected.reason)
        client.close()


@pytest.mark.parametrize("frames", [[b""], [b"\xc1"], [b"\x80"], [b"a", b"b"], [b"\x93" * 5000]])
def test_malformed_messages_are_answered_and_forgotten(
    client: FakeVllm, frames: list[bytes]
) -> None:
    client.send_raw(*frames)
    assert client.wait(lambda m: isinstance(m, Rejected)).code == "protocol"
    client.send(Ping(77))
    assert client.wait(lambda m: isinstance(m, Status) and m.ping_ns == 77).accepting


def test_nothing_is_served_before_hello(receiver: Receiver) -> None:
    client = FakeVllm(receiver)
    client.open([5, 6], GREEDY)
    assert_matches("Hello first", client.wait(lambda m: isinstance(m, Rejected)).reason)
    client.close()


def test_silent_clients_are_dropped(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_receiver.control.server.SILENCE_SECONDS", 1.0)
    with connected(receiver) as client:
        session = opened(client, [5, 6])
        time.sleep(1.3)
        assert receiver.store.get(session) is not None, "it says Ping"
        client.silence()
        assert eventually(lambda: receiver.store.get(session) is None)
        assert receiver.store.reserved_bytes == 0


@pytest.fixture(scope="module")
def small(tiny_llama_path: Path) -> Iterator[Receiver]:
    """A receiver with a token, little memory and room for two sessions."""
    options = {"token": "secret", "kv_memory": 3 << 20, "max_sessions": 2}
    with started(tiny_llama_path, **options) as receiver:
        yield receiver


def test_the_token_opens_both_channels(small: Receiver, prefill: Prefill) -> None:
    kv = prefill(17)
    with connected(small, token="secret") as client:
        session = opened(client, kv.prompt)
        client.send_kv(session, kv)
        client.start(session, kv.first)
        assert [kv.first, *client.tokens(session)] == kv.tokens


@pytest.mark.parametrize("token", ["", "wrong"])
def test_without_the_token_nothing_is_answered(small: Receiver, token: str) -> None:
    stranger = FakeVllm(small, token=token)
    with pytest.raises(AssertionError, match="no such message"):
        stranger.hello(seconds=0.5)
    stranger.close()
    with connected(small, token="secret"):
        pass


def test_memory_and_session_limits(small: Receiver) -> None:
    with connected(small, token="secret") as client:
        refused = client.opened(client.open([5] * 2000, GREEDY))
        assert refused.code == "capacity"
        assert_matches("2000 tokens need 4 MiB.*3 of 3 MiB are free.*--kv-memory", refused.reason)
        sessions = [opened(client, [5, 6]) for _ in range(2)]
        refused = client.opened(client.open([5, 6], GREEDY))
        assert refused.code == "capacity"
        assert_matches("2 sessions are open", refused.reason)
        client.send(Ping(3))
        status = client.wait(lambda m: isinstance(m, Status) and m.ping_ns == 3)
        assert not status.accepting
        assert {progress.session for progress in status.sessions} == set(sessions)
        client.cancel(sessions[0])
        opened(client, [5, 6])


def test_stopping_tells_the_clients(tiny_llama_path: Path) -> None:
    settings = Settings(
        model=str(tiny_llama_path), **HERE, port=0, http_port=None, kv_memory=1 << 28
    )
    receiver = Receiver(settings)
    receiver.start()
    client = FakeVllm(receiver)
    # Said before the model is loaded: kept and answered afterwards.
    receiver_ready = []
    threading.Thread(target=lambda: receiver_ready.append(receiver.wait_ready())).start()
    assert isinstance(client.hello(), Welcome)
    session = opened(client, [5, 6])
    began = time.monotonic()
    receiver.stop()
    assert time.monotonic() - began < 2
    assert client.failed(session).code == "shutdown"
    assert client.wait(lambda m: isinstance(m, Rejected)).code == "shutdown"
    client.close()
    # The control thread closes its sockets itself, and may have done so before it is looked at.
    receiver.stop()


def raw_data(client: FakeVllm) -> socket.socket:
    """A data connection that has proved itself, to be misused."""
    assert client.ticket is not None
    endpoint = msgspec.structs.replace(client.receiver.data_endpoints[0], host="127.0.0.1")
    sock = dial(endpoint, client.ticket, 5.0).sock
    return sock


def assert_matches(pattern: str, text: str) -> None:
    assert re.search(pattern, text), text
