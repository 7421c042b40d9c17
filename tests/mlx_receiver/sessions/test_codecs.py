"""A prompt whose KV comes quantised goes on as MLX does from a cache that it quantised itself."""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_receiver.decode.model import LoadedModel, find_model, load_model
from mlx_receiver.receiver import Receiver
from mlx_receiver.wire.frames import Header
from mlx_receiver.wire.messages import Failed, Opened, Refused, Welcome
from mlx_receiver.wire.sampling import Sampling
from tests.mlx_receiver.client import FakeVllm, Prefilled, blocks, connected, started
from tests.quantised import from_integers, integers, payload, there_and_back
from tests.waiting import eventually

GREEDY = Sampling(max_tokens=24, temperature=0.0)

#: ``of(tokens, codec, dtype)``: a prompt's KV as vLLM has it, and the text that MLX makes of it.
Of = Callable[..., Prefilled]


@pytest.fixture(scope="module")
def loaded(tiny_qwen3_path: Path) -> LoadedModel:
    return load_model(find_model(str(tiny_qwen3_path)))


@pytest.fixture(scope="module")
def of(loaded: LoadedModel) -> Of:
    model = loaded.model

    def run(tokens: int | list[int], codec: str = "raw", dtype: str = "float32") -> Prefilled:
        prompt = tokens
        if isinstance(tokens, int):
            prompt = np.random.default_rng(tokens).integers(20, 49_000, tokens).tolist()
        assert isinstance(prompt, list)
        caches = loaded.cache.empty()
        logits = model(mx.array([prompt]), cache=caches)
        planes = []
        for cache in caches:
            pair = [plane[0, :, : len(prompt)] for plane in (cache.keys, cache.values)]
            pair = [plane.astype(getattr(mx, dtype)) for plane in pair]
            planes.append([integers(plane) for plane in pair])
            if codec != "raw":
                pair = [there_and_back(plane, codec) for plane in pair]
            cache.keys, cache.values = (plane.astype(mx.float32)[None] for plane in pair)
        text = [int(mx.argmax(logits[0, -1]).item())]
        while len(text) < GREEDY.max_tokens:
            logits = model(mx.array([[text[-1]]]), cache=caches)
            text.append(int(mx.argmax(logits[0, -1]).item()))
        return Prefilled(prompt, planes, dtype, text)

    return run


@pytest.fixture(scope="module")
def receiver(tiny_qwen3_path: Path) -> Iterator[Receiver]:
    with started(tiny_qwen3_path) as running:
        yield running


@pytest.fixture
def client(receiver: Receiver) -> Iterator[FakeVllm]:
    with connected(receiver) as found:
        yield found


Frame = tuple[Header, memoryview]


def quantised(frame: Frame, codec: str) -> Frame:
    """The same block as it travels in the codec."""
    header, raw = frame
    kind = np.uint16 if header.dtype != "float32" else np.uint32
    numbers = np.frombuffer(raw, kind).reshape(header.heads, header.tokens, header.width)
    data = payload(from_integers(numbers, header.dtype), codec)
    return replace(header, codec=codec, payload_bytes=len(data)), memoryview(data)


def begin(client: FakeVllm, kv: Prefilled, codec: str, **changes: Any) -> tuple[int, int]:
    """A session, and how many of its tokens are held."""
    session = client.open(kv.prompt, GREEDY, {"codec": codec, **changes})
    answer = client.opened(session)
    assert isinstance(answer, Opened), answer
    return session, answer.held.tokens


def send(client: FakeVllm, frames: list[Frame], codec: str) -> None:
    assert client.data is not None
    for frame in frames:
        header, data = frame if codec == "raw" else quantised(frame, codec)
        client.data.send(header, [data])


def refused(client: FakeVllm, session: int, pattern: str) -> Failed:
    failed = client.failed(session)
    assert re.search(pattern, failed.reason), failed.reason
    return failed


def test_both_codecs_are_offered(receiver: Receiver) -> None:
    client = FakeVllm(receiver)
    welcome = client.hello()
    assert isinstance(welcome, Welcome) and welcome.codecs == ["raw", "q8", "q4"]
    client.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("codec", ["q8", "q4"])
@pytest.mark.parametrize("tokens", [1, 17, 300])
def test_tokens_equal_mlx_from_its_own_quantised_cache(
    receiver: Receiver, of: Of, tokens: int, codec: str, dtype: str
) -> None:
    kv = of(tokens, codec, dtype)
    with connected(receiver, kv_dtype=dtype) as client:
        session, _ = begin(client, kv, codec)
        send(client, blocks(session, kv, random.Random(tokens)), codec)
        client.start(session, kv.first)
        numbers = sum(plane.size for pair in kv.planes for plane in pair)
        size = numbers * kv.planes[0][0].itemsize
        assert client.complete(session).kv_bytes == size, "as if it had come raw"
        assert [kv.first, *client.tokens(session)] == kv.tokens


def test_what_is_lost_shows(of: Of) -> None:
    """Or equal tokens would prove nothing."""
    texts = [of(300, codec).tokens for codec in ("raw", "q8", "q4")]
    assert len({tuple(text) for text in texts}) == 3, texts


def test_codecs_decode_in_one_batch(client: FakeVllm, of: Of) -> None:
    kvs = [(of(tokens, codec), codec) for tokens in (17, 90) for codec in ("raw", "q8", "q4")]
    sessions = []
    for kv, codec in kvs:
        session, _ = begin(client, kv, codec)
        send(client, blocks(session, kv), codec)
        sessions.append(session)
    for (kv, _), session in zip(kvs, sessions, strict=True):
        client.start(session, kv.first)
    for (kv, _), session in zip(kvs, sessions, strict=True):
        assert [kv.first, *client.tokens(session)] == kv.tokens
    assert client.largest_step > 1


# --- what is twice, wrong or forged -------------------------------------------------------------


def test_the_same_numbers_twice_in_other_bytes(client: FakeVllm, of: Of) -> None:
    """What counts is what is decoded: of zeros no scale matters."""
    kv = of(17, "q8")
    for pair in kv.planes:
        pair[0][:] = 0
    session, _ = begin(client, kv, "q8")
    header, data = quantised(blocks(session, kv)[0], "q8")
    other = bytearray(data)
    assert not any(other[: 2 * 17 * 64])
    scales = np.frombuffer(other, np.float32, 2 * 17, 2 * 17 * 64)
    scales[:] *= 3
    assert bytes(other) != bytes(data) and client.data is not None
    for one in (data, memoryview(other)):
        client.data.send(header, [one])
    scales = np.frombuffer(other, np.float32, 2 * 17, 2 * 17 * 64 + 2 * 17 * 4)
    scales[20] = 1.0  # the bias of head 1, token 3
    client.data.send(header, [memoryview(other)])
    refused(client, session, "arrived twice with different bytes, first at head 1, token 3")


@pytest.mark.parametrize(("agreed", "sent"), [("raw", "q8"), ("q8", "raw"), ("q8", "q4")])
def test_a_block_in_another_codec_than_agreed(
    client: FakeVllm, of: Of, agreed: str, sent: str
) -> None:
    kv = of(17)
    session, _ = begin(client, kv, agreed)
    send(client, blocks(session, kv)[:1], sent)
    assert refused(client, session, f"it is {sent}, agreed was {agreed}").code == "block"


@pytest.mark.parametrize("what", ["more", "less", "zip", "a quantised ATTACH", "8-bit", "narrow"])
def test_forged_headers_end_their_connection_alone(client: FakeVllm, of: Of, what: str) -> None:
    kv = of(17, "q8")
    session, _ = begin(client, kv, "q8")
    (header, data), *rest = (quantised(frame, "q8") for frame in blocks(session, kv))
    head = bytearray(header.pack())
    match what:
        case "more" | "less":
            size = header.payload_bytes + (4 if what == "more" else -4)
            head = bytearray(replace(header, payload_bytes=size).pack())
        case "zip":
            head[6] |= 0xF0
        case "a quantised ATTACH":
            head[6] = head[6] & 0xF0 | 2
        case "8-bit":
            head = bytearray(replace(header, dtype="int8").pack())
        case "narrow":
            head = bytearray(replace(header, width=32, tokens=34).pack())
    with contextlib.closing(client.connect_data()) as forger:
        sock = forger._sock  # type: ignore[attr-defined]
        sock.sendall(head + data)
        sock.settimeout(10)
        # Closing with unread bytes resets the connection.
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b"", "it was not closed"
    # Nothing was attached there: the session goes on.
    assert client.data is not None
    for one in [(header, data), *rest]:
        client.data.send(one[0], [one[1]])
    client.start(session, kv.first)
    assert [kv.first, *client.tokens(session)] == kv.tokens


def test_a_damaged_payload_is_noticed_before_it_is_decoded(client: FakeVllm, of: Of) -> None:
    kv = of(17, "q8")
    session, _ = begin(client, kv, "q8")
    header, data = quantised(blocks(session, kv)[0], "q8")
    assert client.data is not None
    client.data.send(replace(header, checksum=12345), [data])
    refused(client, session, "checksum does not match")


@pytest.fixture
def small(tiny_qwen3_path: Path) -> Iterator[FakeVllm]:
    """A client of a receiver with room for one session."""
    with started(tiny_qwen3_path, kv_memory=16 << 20) as running, connected(running) as found:
        yield found


def test_what_decoding_takes_is_given_back(small: FakeVllm, of: Of) -> None:
    kv, store = of(17, "q8"), small.receiver.store
    number, _ = begin(small, kv, "q8")
    session, before = store.get(number), store.budget.reserved
    assert session is not None
    send(small, blocks(number, kv)[:1], "q8")
    assert eventually(lambda: session.timeline.blocks_received == 1)
    assert store.budget.reserved == before
    send(small, blocks(number, kv), "q8")  # one of them twice
    small.start(number, kv.first)
    assert [kv.first, *small.tokens(number)] == kv.tokens
    assert session.timeline.duplicate_blocks == 1
    assert eventually(lambda: store.budget.reserved == 0)


def test_without_memory_to_decode_in_the_session_is_given_up(small: FakeVllm, of: Of) -> None:
    kv, store = of(17, "q8"), small.receiver.store
    number, _ = begin(small, kv, "q8")
    store.budget.total = store.budget.reserved
    send(small, blocks(number, kv)[:1], "q8")
    assert refused(small, number, "no memory to decode it in").code == "capacity"
    assert eventually(lambda: store.budget.reserved == 0)


def test_a_proof_travels_raw(client: FakeVllm) -> None:
    session = client.open([5, 6, 7], GREEDY, {"codec": "q8", "proof": True})
    answer = client.opened(session)
    assert isinstance(answer, Refused) and answer.code == "unsupported"
    assert "a proof travels raw" in answer.reason


# --- what earlier texts left --------------------------------------------------------------------


def rest(session: int, kv: Prefilled, start: int) -> list[Frame]:
    """Blocks of the tokens from ``start`` on."""
    if start == len(kv.prompt):
        return []
    later = Prefilled(kv.prompt, [[p[:, start:] for p in pair] for pair in kv.planes], kv.dtype, [])
    frames = blocks(session, later)
    return [(replace(header, token_start=header.token_start + start), d) for header, d in frames]


def turn(client: FakeVllm, kv: Prefilled, codec: str) -> tuple[int, list[int]]:
    """A hand-off: the tokens that were held, and the whole answer."""
    session, held = begin(client, kv, codec)
    send(client, rest(session, kv, held), codec)
    client.start(session, kv.first)
    tokens = [kv.first, *client.tokens(session)]
    store = client.receiver.store
    assert eventually(lambda: not store.sessions() and store.reserved_bytes == 0)
    return held, tokens


@pytest.mark.parametrize("disk", [False, True])
def test_texts_continue_those_of_their_own_codec_alone(
    tiny_qwen3_path: Path, of: Of, tmp_path: Path, disk: bool
) -> None:
    options: dict[str, Any] = {"prompt_cache": True}
    if disk:
        options["kv_disk"] = str(tmp_path)
    with started(tiny_qwen3_path, **options) as receiver:
        with connected(receiver, weights="a fingerprint") as client:
            store = receiver.store
            for number, codec in enumerate(("raw", "q8", "q4")):
                kv = of(300, codec)
                assert turn(client, kv, codec) == (0, kv.tokens), codec
                assert len(store.residents) == number + 1
            if disk:
                tier = store.earlier._disk
                assert tier is not None and tier.flush(20)
                while store.residents.reclaim():
                    pass
            for codec in ("q4", "raw", "q8"):
                kv = of(300, codec)
                held, tokens = turn(client, kv, codec)
                assert tokens == kv.tokens, codec
                assert held == (256 if disk else 300), codec
