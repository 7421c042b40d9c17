"""A protected ``tcp`` connection, and somebody in the middle who can do everything."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import get_args

import msgspec
import pytest

from mlx_receiver.transports.seal import TAG_BYTES
from mlx_receiver.transports.tcp import TcpTransport
from mlx_receiver.transports.tcp_listener import TcpListener
from mlx_receiver.transports.transport import Sender, TransportError
from mlx_receiver.wire import frames
from mlx_receiver.wire.frames import HEADER_BYTES, DataHello, DataReply, Header, Kind, Level
from tests.waiting import eventually
from tests.wire import peers
from tests.wire.middle import Middle, between, parts, quiet
from tests.wire.sink import OTHER, TICKET, MemorySink, make_block

Frame = tuple[Header, list[memoryview]]


@pytest.fixture
def bystander(listener: TcpListener, sink: MemorySink, level: Level) -> Iterator[Sender]:
    """Somebody else's connection, which must not notice anything."""
    sender = TcpTransport(level).connect(listener.endpoint, OTHER, 10.0)
    yield sender
    sender.send(*make_block(88, 0))
    sink.wait(lambda: (88, 0) in sink.landed)
    assert sink.owners[88, 0] == OTHER.client
    sender.close()


@pytest.fixture
def middle(listener: TcpListener) -> Iterator[Middle]:
    """Somebody on the way."""
    with between(listener) as made:
        yield made


def flip(data: bytes, at: int) -> bytes:
    """One bit of one byte is another."""
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


class Attack:
    """A connection through the middle: one block has come through, two more wait there."""

    def __init__(self, middle: Middle, sink: MemorySink, level: Level) -> None:
        self.middle, self.sink, self.level = middle, sink, level
        self.sender = TcpTransport(level).connect(middle.endpoint, TICKET, 5.0)
        self.blocks = [make_block(1, n, heads=2, tokens=64, width=16) for n in range(3)]
        self.waiting = [self._caught(block) for block in self.blocks]
        self.say(*self.waiting.pop(0))
        sink.wait(lambda: (1, 0) in sink.landed)

    def _caught(self, block: Frame) -> tuple[bytes, bytes]:
        self.sender.send(*block)
        head, payload = parts(block[0], self.level)
        return self.middle.take("client", head), self.middle.take("client", payload)

    def say(self, *pieces: bytes) -> None:
        """To the receiver."""
        self.middle.tell("receiver", b"".join(pieces))

    def until_it_ends(self) -> None:
        """Both sides notice, and nothing of it is kept."""
        assert self.middle.hung_up("receiver")
        assert eventually(self._noticed)
        assert list(self.sink.landed) == [(1, 0)]
        assert self.sink.landed[1, 0] == b"".join(self.blocks[0][1])
        assert self.sink.pending == 0

    def _noticed(self) -> bool:
        try:
            self.sender.send(Header(Kind.ATTACH, 1, 0))
            self.sender.replies()
        except TransportError:
            return True
        return False


def _header_bits(attack: Attack) -> bytes:
    head, payload = attack.waiting[0]
    return flip(head, 40) + payload


def _another_session(attack: Attack) -> bytes:
    head, payload = attack.waiting[0]
    return flip(head, 8) + payload


def _header_tag(attack: Attack) -> bytes:
    head, payload = attack.waiting[0]
    return flip(head, HEADER_BYTES + 5) + payload


def _payload_bits(attack: Attack) -> bytes:
    head, payload = attack.waiting[0]
    return head + flip(payload, 777)


def _payload_tag(attack: Attack) -> bytes:
    head, payload = attack.waiting[0]
    return head + flip(payload, len(payload) - 1)


def _dropped(attack: Attack) -> bytes:
    return b"".join(attack.waiting[1])


def _swapped(attack: Attack) -> bytes:
    return b"".join(attack.waiting[1] + attack.waiting[0])


def _payloads_swapped(attack: Attack) -> bytes:
    (one, first), (two, second) = attack.waiting
    return one + second + two + first


def _payload_left_out(attack: Attack) -> bytes:
    return attack.waiting[0][0] + b"".join(attack.waiting[1])


def _tag_left_out(attack: Attack) -> bytes:
    head, payload = attack.waiting[0]
    return head + payload[:-TAG_BYTES] + b"".join(attack.waiting[1])


def _clear_frame(attack: Attack) -> bytes:
    header, rows = attack.blocks[1]
    return header.pack() + b"".join(rows)


def _made_up(attack: Attack) -> bytes:
    header, rows = attack.blocks[1]
    return header.pack() + bytes(TAG_BYTES) + b"".join(rows) + bytes(TAG_BYTES)


def _noise(attack: Attack) -> bytes:
    return random.randbytes(1000) + b"".join(attack.waiting[0])


ATTACKS: dict[str, Callable[[Attack], bytes]] = {
    attack.__name__[1:]: attack
    for attack in (
        _header_bits, _another_session, _header_tag, _payload_bits, _payload_tag, _dropped,
        _swapped, _payloads_swapped, _payload_left_out, _tag_left_out, _clear_frame, _made_up,
        _noise,
    )
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_that_was_touched_is_kept(
    middle: Middle,
    sink: MemorySink,
    bystander: Sender,
    level: Level,
    name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    attack = Attack(middle, sink, level)
    attack.say(ATTACKS[name](attack))
    attack.until_it_ends()
    (line,) = [record.getMessage() for record in caplog.records]
    assert "a frame was changed, lost, repeated or made up on the way" in line


def test_a_frame_that_comes_twice_is_taken_once(
    middle: Middle, sink: MemorySink, bystander: Sender, level: Level
) -> None:
    attack = Attack(middle, sink, level)
    attack.say(*attack.waiting[0])
    sink.wait(lambda: (1, 1) in sink.landed)
    attack.say(*attack.waiting[0])
    assert middle.hung_up("receiver")
    assert sink.order == [(1, 0), (1, 1)] and sink.pending == 0


def test_the_receivers_own_words_are_none_of_a_client(
    middle: Middle, sink: MemorySink, bystander: Sender, level: Level
) -> None:
    sender = TcpTransport(level).connect(middle.endpoint, TICKET, 5.0)
    size = len(msgspec.msgpack.encode(DataReply(5, True)))
    for session in (5, 6):
        sender.send(Header(Kind.ATTACH, session, 0))
        middle.tell("receiver", middle.take("client", HEADER_BYTES + TAG_BYTES))
        head = middle.take("receiver", HEADER_BYTES + TAG_BYTES)
        middle.take("receiver", size + TAG_BYTES)
    assert not middle.hung_up("receiver", 0.2)
    # The second answer's header has the number that the client's third one would have.
    middle.tell("receiver", head)
    assert middle.hung_up("receiver")
    sender.close()


@pytest.mark.parametrize("where", ["header", "payload", "tag"])
def test_a_frame_that_is_cut_off(
    middle: Middle, sink: MemorySink, bystander: Sender, level: Level, where: str
) -> None:
    attack = Attack(middle, sink, level)
    head, payload = attack.waiting[0]
    whole = head + payload
    cut = {"header": 30, "payload": len(head) + 100, "tag": len(whole) - 3}[where]
    attack.say(whole[:cut])
    middle.hang_up("receiver")
    attack.until_it_ends()


def test_a_frame_of_another_connection(
    listener: TcpListener, middle: Middle, sink: MemorySink, bystander: Sender, level: Level
) -> None:
    with between(listener) as recording:
        other = TcpTransport(level).connect(recording.endpoint, TICKET, 5.0)
        other.send(*make_block(5, 0))
        frame = recording.take("client", sum(parts(make_block(5, 0)[0], level)))
        other.close()
    sender = TcpTransport(level).connect(middle.endpoint, TICKET, 5.0)
    # The same number, of the same client.
    middle.tell("receiver", frame)
    assert middle.hung_up("receiver")
    assert sink.landed == {} and sink.pending == 0
    sender.close()


def test_a_connection_that_is_repeated_from_its_start(
    listener: TcpListener, middle: Middle, sink: MemorySink, bystander: Sender, level: Level
) -> None:
    attack = Attack(middle, sink, level)
    for frame in attack.waiting:
        attack.say(*frame)
    sink.wait(lambda: len(sink.landed) == 3)
    sink.landed.clear()
    with peers.call(listener) as sock:
        sock.sendall(middle.recorded)
        assert peers.closed(sock, 5)
    assert sink.landed == {} and sink.pending == 0
    attack.sender.close()


@pytest.mark.parametrize("other", get_args(Level))
def test_a_level_that_is_changed_on_the_way(
    listener: TcpListener, sink: MemorySink, bystander: Sender, level: Level, other: Level
) -> None:
    def changed(frame: bytes) -> bytes:
        hello = frames.hello_decoder.decode(frame[HEADER_BYTES:])
        assert hello.level == level
        body = msgspec.msgpack.encode(DataHello(hello.client, hello.nonce, other))
        return replace(frames.unpack(frame[:HEADER_BYTES]), payload_bytes=len(body)).pack() + body

    with between(listener, changed) as middle:
        if other == level:
            TcpTransport(level).connect(middle.endpoint, TICKET, 5.0).close()
            return
        with pytest.raises(TransportError, match="another program answers"):
            TcpTransport(level).connect(middle.endpoint, TICKET, 5.0)
        # No proof either.
        assert frames.unpack(middle.recorded[:HEADER_BYTES]).kind is Kind.HELLO
        assert (
            len(middle.recorded)
            == HEADER_BYTES + frames.unpack(middle.recorded[:HEADER_BYTES]).payload_bytes
        )
    assert sink.landed == {}


@pytest.mark.parametrize("what", ["header", "header's tag", "reply", "reply's tag", "dropped",
                                  "swapped", "twice"])  # fmt: skip
def test_replies_that_were_touched_are_not_believed(
    middle: Middle, sink: MemorySink, bystander: Sender, level: Level, what: str
) -> None:
    sender = TcpTransport(level).connect(middle.endpoint, TICKET, 5.0)
    replies = []
    for session in (5, 6):
        sender.send(Header(Kind.ATTACH, session, 0))
        middle.tell("receiver", middle.take("client", HEADER_BYTES + TAG_BYTES))
        body = msgspec.msgpack.encode(DataReply(session, True))
        head = middle.take("receiver", HEADER_BYTES + TAG_BYTES)
        replies.append((head, middle.take("receiver", len(body) + TAG_BYTES)))
    (head, body), second = replies
    if what == "twice":
        middle.tell("client", head + body)
        heard: list[DataReply] = []
        assert eventually(lambda: bool(heard.extend(sender.replies()) or heard))
        assert heard == [DataReply(5, True)]
    middle.tell("client", {
        "header": flip(head, 8) + body,
        "header's tag": flip(head, HEADER_BYTES) + body,
        "reply": head + flip(body, len(body) - TAG_BYTES - 1),
        "reply's tag": head + flip(body, len(body) - 1),
        "dropped": b"".join(second),
        "swapped": b"".join(second) + head + body,
        "twice": head + body,
    }[what])  # fmt: skip
    with pytest.raises(TransportError, match="changed, lost, repeated or made up"):
        for _ in range(100):
            assert sender.replies() == []
            quiet(0.02)
    with pytest.raises(TransportError, match="is closed"):
        sender.send(*make_block(1, 0))


@pytest.mark.parametrize("name", ["payload_bits", "dropped", "swapped", "twice"])
def test_in_the_clear_nobody_would_notice(middle: Middle, sink: MemorySink, name: str) -> None:
    """The same attacks where nothing protects: they do what they are meant to do."""
    attack = Attack(middle, sink, "clear")
    (head, payload), second = attack.waiting
    said = {
        "payload_bits": head + flip(payload, 0),
        "dropped": b"".join(second),
        "swapped": b"".join(second) + head + payload,
        "twice": (head + payload) * 2,
    }[name]
    attack.say(said)
    expected = {"payload_bits": [1], "dropped": [2], "swapped": [2, 1], "twice": [1, 1]}[name]
    sink.wait(lambda: len(sink.order) == 1 + len(expected))
    assert sink.order == [(1, 0), *((1, n) for n in expected)]
    if name == "payload_bits":
        assert sink.landed[1, 1] == flip(b"".join(attack.blocks[1][1]), 0)
    attack.sender.close()
