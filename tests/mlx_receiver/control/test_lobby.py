"""A receiver without a model: whom it listens to, and what it then loads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import zmq

from mlx_receiver.decode.choice import choose, parse_map
from mlx_receiver.pairing.keystore import Keystore
from mlx_receiver.pairing.offer import new_offer
from mlx_receiver.pairing.visit import pair
from mlx_receiver.receiver import Receiver
from mlx_receiver.settings import Settings, SettingsError
from mlx_receiver.waiting import WaitingReceiver
from mlx_receiver.wire import keys
from mlx_receiver.wire.codec import decode_receiver, encode
from mlx_receiver.wire.handshake import Introduction
from mlx_receiver.wire.layout import DTYPES, full_attention
from mlx_receiver.wire.messages import (
    E_MODEL,
    E_PROTOCOL,
    E_VERSION,
    Ping,
    Rejected,
    Welcome,
    WireError,
)
from mlx_receiver.wire.signature import ModelSignature
from tests.conftest import own_address
from tests.mlx_receiver.client import HERE, FakeVllm, started
from tests.waiting import eventually

ME = Introduction(ModelSignature("", 0, 0, []), full_attention(1, 1, 1, DTYPES[0]), "test")


def settings(**options: Any) -> Settings:
    return Settings(**{"host": "*", "port": 0, "http_port": 0, "discovery": False, **options})


@pytest.fixture
def waiting() -> Iterator[WaitingReceiver]:
    chosen = settings(model_map="ours/m=theirs/n")
    with WaitingReceiver(chosen, lambda asked: choose(chosen, asked)) as receiver:
        yield receiver


def say(waiting: WaitingReceiver, *frames: bytes, host: str = "127.0.0.1") -> Rejected | None:
    """The answer, None where there is none within half a second."""
    me = Keystore("vllm").identity()
    known = keys.ClientKeys(waiting.desk.card.key.encode(), me.public.encode(), me.secret.encode())
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        keys.guard_client(socket, known)
        # Without a handshake there is nobody to send to.
        socket.setsockopt(zmq.SNDTIMEO, 500)
        socket.connect(f"tcp://{host}:{waiting.port}")
        try:
            socket.send_multipart(frames)
        except zmq.Again:
            return None
        if not socket.poll(500):
            return None
        answer = decode_receiver(socket.recv())
        assert isinstance(answer, Rejected)
        return answer


def hello(model: str) -> bytes:
    return encode(msgspec.structs.replace(ME, model=model).hello())


def test_the_first_model_that_is_asked_for_is_the_one(waiting: WaitingReceiver) -> None:
    assert waiting.wait(0) is None
    answer = say(waiting, hello("ours/m"))
    assert answer is not None and answer.code == E_MODEL
    assert "loads theirs/n now" in answer.reason
    assert waiting.wait(1) == "theirs/n"
    say(waiting, hello("somebody/else"))
    assert waiting.wait(0) == "theirs/n"


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ((hello(""),), E_MODEL),
        ((hello("/models/llama"),), E_MODEL),
        ((hello("../../etc/passwd"),), E_MODEL),
        ((hello("a/b/c"),), E_MODEL),
        ((hello("https://evil.example/model"),), E_MODEL),
        ((encode(Ping(0)),), E_PROTOCOL),
        ((b"nonsense",), E_PROTOCOL),
        ((hello("a/b"), b"more"), E_PROTOCOL),
        ((encode(msgspec.structs.replace(ME.hello(), protocol=1)),), E_VERSION),
    ],
)
def test_anything_else_is_refused_in_words_and_loads_nothing(
    waiting: WaitingReceiver, frames: tuple[bytes, ...], code: str
) -> None:
    answer = say(waiting, *frames)
    assert answer is not None and answer.code == code, answer
    assert waiting.wait(0) is None
    assert say(waiting, hello("ours/m")) is not None


def test_a_machine_that_is_not_paired_is_not_heard(
    waiting: WaitingReceiver,
) -> None:
    other = own_address()
    assert say(waiting, hello("ours/m"), host=other) is None
    assert waiting.wait(0) is None
    code = new_offer(waiting.desk.keystore).shown
    store = Keystore("vllm")
    pair(store, other, waiting.port, waiting.http_port, code)
    try:
        assert say(waiting, hello("ours/m"), host=other) is not None
        assert waiting.wait(1) == "theirs/n"
    finally:
        waiting.desk.keystore.remove("*")
        store.remove("*")


def test_its_health_says_that_it_waits(waiting: WaitingReceiver) -> None:
    base = f"http://127.0.0.1:{waiting.http_port}"
    answer = httpx.get(f"{base}/health")
    assert (answer.status_code, answer.json()["status"]) == (503, "waiting for a model")
    assert httpx.get(f"{base}/v1/models").status_code == 404


def test_the_ports_are_free_afterwards() -> None:
    with WaitingReceiver(settings(), lambda asked: asked) as first:
        port, http_port = first.port, first.http_port
    again = settings(port=port, http_port=http_port)
    with WaitingReceiver(again, lambda asked: asked) as second:
        assert (second.port, second.http_port) == (port, http_port)
        assert eventually(lambda: httpx.get(f"http://127.0.0.1:{http_port}/health").is_error)


def test_a_port_in_use_is_named() -> None:
    with WaitingReceiver(settings(), lambda asked: asked) as first:
        for option, port in (("--port", first.port), ("--http-port", first.http_port)):
            name = option.removeprefix("--").replace("-", "_")
            with pytest.raises(SettingsError, match=option):
                WaitingReceiver(settings(**{name: port}), lambda asked: asked).__enter__()


def test_which_model_stands_for_which(tmp_path: Path) -> None:
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text("{}")
    given = settings(models=str(tmp_path), model_map="a/b=c/d, /srv/x = e/f")
    assert choose(given, "a/b") == "c/d"
    assert choose(given, "/srv/x") == "e/f"
    assert choose(given, "meta/llama") == str(tmp_path / "llama")
    assert choose(given, "/models/llama/") == str(tmp_path / "llama")
    assert choose(given, "meta/other-1.5B") == "meta/other-1.5B"
    for asked in ("/models/other", "other", "..", "a/..", "", "a/b\n", "a b/c", "-a/b"):
        with pytest.raises(WireError, match="--model"):
            choose(given, asked)


def test_a_map_that_is_none_is_quoted() -> None:
    assert parse_map("") == {}
    for text in ("a", "a=", "=b", "a=b,c"):
        with pytest.raises(SettingsError, match="VLLM_NAME=MODEL"):
            parse_map(text)


def test_a_folder_of_models_that_is_none() -> None:
    with pytest.raises(SettingsError, match="--models /no/such/folder is no folder"):
        settings(models="/no/such/folder").check()


def test_the_next_vllm_may_serve_another_model(tiny_llama_path: Path) -> None:
    """But not while there is one that this model was loaded for."""
    mine, another = str(tiny_llama_path), "owner/another"
    options = {**HERE, "port": 0, "http_port": None, "kv_memory": 1 << 28}
    with Receiver(Settings(model=mine, **options), choose=lambda asked: asked) as receiver:
        first = FakeVllm(receiver)
        assert isinstance(first.hello(model=mine), Welcome)
        second = FakeVllm(receiver)
        answer = second.hello(model=another)
        assert isinstance(answer, Rejected) and "to another vLLM" in answer.reason
        assert receiver.control.wanted == ""
        first.close()
        assert eventually(lambda: not receiver.control.clients)
        third = FakeVllm(receiver)
        answer = third.hello(model=another)
        assert isinstance(answer, Rejected) and f"loads {another} now" in answer.reason
        assert receiver.control.wanted == another
        for client in (second, third):
            client.close()


def test_a_receiver_of_one_model_does_not_look_at_names(tiny_llama_path: Path) -> None:
    with started(tiny_llama_path) as receiver:
        client = FakeVllm(receiver)
        assert isinstance(client.hello(model="whatever/it-is-called"), Welcome)
        assert receiver.control.wanted == ""
        client.close()
