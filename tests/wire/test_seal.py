"""What protects a ``tcp`` connection, and when it does."""

from __future__ import annotations

import random
import socket
import threading
import time
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_receiver import plugins
from mlx_receiver.transports import seal
from mlx_receiver.transports.carrier import BackChannel
from mlx_receiver.transports.seal import CHUNK_BYTES, TAG_BYTES, Opener, Sealer
from mlx_receiver.transports.tcp import TcpTransport
from mlx_receiver.transports.tcp_listener import TcpListener
from mlx_receiver.transports.transport import TransportError
from mlx_receiver.wire import frames
from mlx_receiver.wire.frames import HEADER_BYTES, DataReply, Header, Kind, Level
from mlx_receiver.wire.keys import new_nonce
from tests.waiting import eventually
from tests.wire import peers
from tests.wire.middle import between, parts
from tests.wire.sink import LATER, OTHER, REFUSED, TICKET, MemorySink, make_block

LEVELS: tuple[Level, ...] = get_args(Level)
PROTECTED: tuple[Level, ...] = ("signed", "sealed")
KEY, NONCES = TICKET.key, bytes(range(64))

Frame = tuple[Header, list[memoryview]]


# --- one direction ------------------------------------------------------------------------------


def sent(sealer: Sealer, header: bytes, payload: list[memoryview]) -> bytes:
    """A frame as it travels."""
    return b"".join(b"".join(chunk) for chunk in sealer.frame(header, payload))


def split(data: bytes, source: random.Random, pieces: int) -> list[memoryview]:
    """The bytes in so many parts, some of them empty."""
    cuts = sorted(source.randint(0, len(data)) for _ in range(pieces - 1))
    edges = zip([0, *cuts], [*cuts, len(data)], strict=True)
    return [memoryview(bytearray(data[low:high])) for low, high in edges]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "size", [0, 1, 15, 4097, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 7]
)
@pytest.mark.parametrize("pieces", [1, 2, 9])
def test_what_is_sent_is_what_comes(level: Level, size: int, pieces: int) -> None:
    source = random.Random(f"{size} {pieces}")
    sealer = Sealer(level, KEY, NONCES, "client")
    opener = Opener(level, KEY, NONCES, "client")
    for _ in range(3):
        header, data = source.randbytes(HEADER_BYTES), source.randbytes(size)
        payload = split(data, source, pieces)
        frame = sent(sealer, header, payload)
        assert b"".join(payload) == data, "the caller's memory was written to"
        head, body = frame[: opener.head_bytes], frame[opener.head_bytes :]
        assert opener.small(head) == header
        assert (header in frame) == (level != "sealed")
        if not size:
            assert body == b""
            continue
        assert len(body) == size + opener.tag_bytes
        if size > 8:
            assert (data in frame) == (level != "sealed")
        landed = split(body[:size], source, pieces)
        opener.payload(landed, memoryview(body[size:]))
        assert b"".join(landed) == data


@pytest.mark.parametrize("what", ["level", "key", "nonces", "side", "number"])
def test_every_connection_direction_and_number_has_a_tag_of_its_own(
    level: Level, what: str
) -> None:
    other: Level = "signed" if level == "sealed" else "sealed"
    opener = {
        "level": Opener(other, KEY, NONCES, "client"),
        "key": Opener(level, OTHER.key, NONCES, "client"),
        "nonces": Opener(level, KEY, NONCES[1:] + b"x", "client"),
        "side": Opener(level, KEY, NONCES, "receiver"),
        "number": Opener(level, KEY, NONCES, "client"),
    }[what]
    if what == "number":
        opener.skip()
    frame = Sealer(level, KEY, NONCES, "client").small(bytes(HEADER_BYTES))
    with pytest.raises(TransportError, match="changed, lost, repeated or made up"):
        opener.small(frame)
    assert Opener(level, KEY, NONCES, "client").small(frame) == bytes(HEADER_BYTES)


def test_levels_and_directions_have_keys_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[bytes] = []
    monkeypatch.setattr(seal, "AESGCM", keys.append)
    for level in PROTECTED:
        for key in (KEY, OTHER.key):
            for nonces in (NONCES, NONCES[::-1]):
                Sealer(level, key, nonces, "client")
                Sealer(level, key, nonces, "receiver")
    assert len(set(keys)) == len(keys) == 16 and not {KEY, OTHER.key} & set(keys)


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from(PROTECTED),
    st.lists(st.lists(st.integers(0, 5000), max_size=4), min_size=1, max_size=20),
    st.data(),
)
def test_no_nonce_comes_twice(level: Level, payloads: list[list[int]], data: Any) -> None:
    used: list[bytes] = []
    real = seal._Numbered.nonce

    def noted(self: Any) -> bytes:
        used.append(real(self))
        return used[-1]

    sealer, expected = Sealer(level, KEY, NONCES, "client"), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seal._Numbered, "nonce", noted)
        for sizes in payloads:
            if data.draw(st.booleans()):
                body = bytes(sum(sizes) % 97)
                sealer.small(bytes(HEADER_BYTES), body)
                expected += 1 + bool(body)
            else:
                sent(sealer, bytes(HEADER_BYTES), [memoryview(bytes(size)) for size in sizes])
                expected += 1 + bool(sum(sizes))
    assert used == [number.to_bytes(12, "big") for number in range(expected)]


def test_replies_from_many_threads_are_numbered_in_the_order_in_which_they_leave(
    level: Level,
) -> None:
    here, there = socket.socketpair()
    back = BackChannel(here, Sealer(level, KEY, NONCES, "receiver"))
    opener = Opener(level, KEY, NONCES, "receiver")

    def talk(session: int) -> None:
        for _ in range(200):
            back.reply(DataReply(session, True, "", "x" * session))

    def read(count: int) -> bytes:
        return there.recv(count, socket.MSG_WAITALL)

    with here, there:
        here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        threads = [threading.Thread(target=talk, args=[n]) for n in range(1, 9)]
        for thread in threads:
            thread.start()
        counts = dict.fromkeys(range(1, 9), 0)
        for _ in range(8 * 200):
            header = frames.unpack(opener.small(read(opener.head_bytes)))
            reply = frames.decode_reply(opener.small(read(header.payload_bytes + TAG_BYTES)))
            assert reply == DataReply(header.session, True, "", "x" * header.session)
            counts[header.session] += 1
        for thread in threads:
            thread.join(10)
    assert set(counts.values()) == {200}


# --- a connection -------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_blocks_and_replies_come_through(
    listener: TcpListener, sink: MemorySink, level: Level
) -> None:
    sender = TcpTransport(level).connect(listener.endpoint, TICKET, 10.0)
    blocks = [make_block(1, n, heads=1 + n % 8, tokens=1 + 97 * n, width=1 + n) for n in range(40)]
    blocks.append(make_block(1, 40, heads=8, tokens=CHUNK_BYTES // 256 + 1, width=128))
    refused = make_block(REFUSED, 0, heads=3, tokens=3000, width=128)
    for number, block in enumerate(blocks):
        if number % 5 == 0:
            sender.send(Header(Kind.ATTACH, LATER if number == 5 else 100 + number, 0))
        if number % 7 == 0:
            sender.send(*refused)
        sender.send(*block)
    sink.wait(lambda: len(sink.landed) == len(blocks))
    for header, rows in blocks:
        assert sink.landed[1, header.layer] == b"".join(rows)
    assert len(sink.refusals) == 6
    found: list[DataReply] = []
    until = time.monotonic() + 10
    while len(found) < 9 and time.monotonic() < until:
        found += sender.replies()
    assert len(found) == 9 and all(reply.accepted for reply in found)
    sender.close()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES + 1])
def test_probes_are_thrown_away(
    listener: TcpListener, sink: MemorySink, level: Level, size: int
) -> None:
    sender = TcpTransport(level).connect(listener.endpoint, TICKET, 10.0)
    for number in range(2):
        sender.send(Header(Kind.PROBE, 0, size), [memoryview(bytes(size))] if size else [])
        sender.send(*make_block(1, number))
    sink.wait(lambda: len(sink.landed) == 2)
    assert sink.order == [(1, 0), (1, 1)] and not sink.refusals
    heard: list[DataReply] = []
    assert eventually(lambda: heard.extend(sender.replies()) or len(heard) == 2)
    sender.close()


def test_two_connections_of_a_client_say_nothing_alike(
    listener: TcpListener, sink: MemorySink
) -> None:
    heard = []
    header, rows = make_block(1, 0)
    for _ in range(2):
        with between(listener) as middle:
            sender = TcpTransport("sealed").connect(middle.endpoint, TICKET, 5.0)
            sender.send(header, rows)
            heard.append(middle.take("client", sum(parts(header, "sealed"))))
            sender.close()
    pairs = [heard[0][at : at + 16] == heard[1][at : at + 16] for at in range(len(heard[0]) - 16)]
    assert not any(pairs)
    assert not any(bytes(row) in one for one in heard for row in rows)


# --- which level --------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ends take the other for another machine."""
    monkeypatch.setattr(seal, "is_this_machine", lambda host: False)


def level_of(sender: Any) -> Level:
    """How the connection is protected."""
    return sender._sealer._level


def test_on_one_machine_nothing_is_protected(listener: TcpListener) -> None:
    sender = TcpTransport().connect(listener.endpoint, TICKET, 5.0)
    assert level_of(sender) == "clear"
    sender.close()


@pytest.mark.parametrize(
    ("offered", "wanted", "level"),
    [
        (False, False, "sealed"),
        (True, False, "sealed"),
        (True, True, "signed"),
    ],
)
def test_between_machines_both_must_ask_for_less(
    elsewhere: None, sink: MemorySink, offered: bool, wanted: bool, level: Level
) -> None:
    listener = TcpListener("127.0.0.1", 0, sink, plain=offered)
    assert listener.endpoint.plain == offered
    endpoint = msgspec.structs.replace(listener.endpoint, plain=offered and wanted)
    sender = TcpTransport().connect(endpoint, TICKET, 5.0)
    assert level_of(sender) == level
    sender.send(*make_block(1, 0))
    sink.wait(lambda: (1, 0) in sink.landed)
    sender.close()
    listener.close()


@pytest.mark.parametrize(
    ("asked", "plain", "complaint"),
    [
        ("clear", False, "passed on to here"),
        ("clear", True, "passed on to here"),
        ("signed", False, "--plain-data is not set here"),
    ],
)
def test_a_level_that_was_not_offered_is_refused(
    elsewhere: None,
    sink: MemorySink,
    caplog: pytest.LogCaptureFixture,
    asked: Level,
    plain: bool,
    complaint: str,
) -> None:
    listener = TcpListener("127.0.0.1", 0, sink, plain=plain)
    with pytest.raises(TransportError, match=r"127\.0\.0\.1:"):
        TcpTransport(asked).connect(listener.endpoint, TICKET, 5.0)
    assert eventually(lambda: bool(caplog.records))  # the connection is closed first
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"its blocks would come {asked}" in line and complaint in line
    TcpTransport().connect(listener.endpoint, TICKET, 5.0).close()
    listener.close()


@pytest.mark.parametrize("said", ["open", "", "SEALED", None])
def test_a_level_that_there_is_not(listener: TcpListener, said: Any) -> None:
    with peers.call(listener) as sock:
        hello = {"client": TICKET.client, "nonce": new_nonce(), "level": said}
        if said is None:
            del hello["level"]
        peers.say(sock, Kind.HELLO, hello)
        assert peers.closed(sock, 2)


@pytest.mark.parametrize("name", ["zmq", "nixl"])
def test_what_cannot_encrypt_must_be_allowed_between_machines(
    monkeypatch: pytest.MonkeyPatch, sink: MemorySink, name: str
) -> None:
    if name not in plugins.transports():
        pytest.skip("the package nixl is not installed (Linux only)")
    transport = plugins.transport(name)
    listener = transport.listen("127.0.0.1", 0, sink)
    monkeypatch.setattr(seal, "is_this_machine", lambda host: False)
    with pytest.raises(TransportError, match=r"tcp transport .* on both sides .*--plain-data"):
        transport.connect(listener.endpoint, TICKET, 5.0)
    # Whoever connects all the same is refused by the other side.
    with pytest.raises(TransportError):
        transport.connect(msgspec.structs.replace(listener.endpoint, plain=True), TICKET, 5.0)
    listener.close()
    listener = transport.listen("127.0.0.1", 0, sink, plain=True)
    assert listener.endpoint.plain
    sender = transport.connect(listener.endpoint, TICKET, 5.0)
    sender.send(*make_block(1, 0))
    sink.wait(lambda: (1, 0) in sink.landed)
    sender.close()
    listener.close()
