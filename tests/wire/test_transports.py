"""What every data transport owes: the same cases on each of them."""

from __future__ import annotations

import importlib.util
import itertools
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from xxhash import xxh3_64_intdigest

from mlx_receiver import plugins
from mlx_receiver.transports.transport import Listener, Sender, Transport, TransportError
from mlx_receiver.wire.frames import MAX_PAYLOAD, DataReply, Header, Kind
from mlx_receiver.wire.keys import new_nonce, new_ticket
from mlx_receiver.wire.messages import E_BLOCK, E_SESSION, DataTicket
from tests.wire.sink import FAULTY, LATER, OTHER, REFUSED, TICKET, Forged, MemorySink, make_block

TIMEOUT = 3.0

_SENDS_FOREVER = """
import sys
from mlx_receiver import plugins
import msgspec
from mlx_receiver.wire.messages import DataTicket, Endpoint
from tests.wire.sink import make_block
endpoint, ticket = (
    msgspec.json.decode(text, type=kind)
    for text, kind in zip(sys.argv[1:], (Endpoint, DataTicket))
)
sender = plugins.transport(endpoint.transport).connect(endpoint, ticket, 5.0)
header, rows = make_block(1, 0, heads=8, tokens=4096, width=128)
while True:
    sender.send(header, rows)
"""


@pytest.fixture(params=["tcp", "zmq", "nixl"])
def transport(request: pytest.FixtureRequest) -> Transport:
    """Each transport in turn."""
    if request.param == "nixl" and importlib.util.find_spec("nixl") is None:
        pytest.skip("the package nixl is not installed (Linux only)")
    return plugins.transport(request.param)


@pytest.fixture
def sink() -> Iterator[MemorySink]:
    """The receiver's memory."""
    made = MemorySink()
    yield made
    made.gate.set()


@pytest.fixture
def listener(transport: Transport, sink: MemorySink) -> Iterator[Listener]:
    """The receiving end."""
    made = transport.listen("127.0.0.1", 0, sink)
    yield made
    sink.gate.set()
    made.close()


@pytest.fixture
def connect(transport: Transport, listener: Listener) -> Iterator[Any]:
    """``connect(ticket, timeout=...)``: a sender that is closed at the end."""
    senders: list[Sender] = []

    def made(ticket: DataTicket = TICKET, timeout: float = 30.0) -> Sender:
        senders.append(transport.connect(listener.endpoint, ticket, timeout))
        return senders[-1]

    yield made
    for sender in senders:
        sender.close()


def send_all(sender: Sender, blocks: list[tuple[Header, list[memoryview]]]) -> None:
    for header, rows in blocks:
        sender.send(header, rows)


def until_refused(sender: Sender, seconds: float) -> TransportError:
    """The error that the sender gets to see within that time, sending nothing more of note."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            sender.send(Header(Kind.ATTACH, 7, 0))
            sender.replies()
        except TransportError as error:
            return error
        time.sleep(0.01)
    raise AssertionError(f"no error within {seconds} s")


def answers(sender: Sender, count: int) -> list[DataReply]:
    end = time.monotonic() + 20
    found: list[DataReply] = []
    while len(found) < count:
        assert time.monotonic() < end, found
        found += sender.replies()
        time.sleep(0.005)
    return found


@pytest.mark.parametrize("shuffled", [False, True])
def test_blocks_land_intact(connect: Any, sink: MemorySink, shuffled: bool) -> None:
    sender = connect()
    blocks = [make_block(1, n, heads=1 + n % 8, tokens=1 + 97 * n) for n in range(40)]
    if shuffled:
        random.Random(0).shuffle(blocks)
    send_all(sender, blocks)
    sink.wait(lambda: len(sink.landed) == 40)
    for header, rows in blocks:
        assert sink.landed[1, header.layer] == b"".join(rows)
    assert sink.order == [(1, header.layer) for header, _ in blocks]


def test_the_payload_is_the_callers_again_after_send(connect: Any, sink: MemorySink) -> None:
    sender = connect()
    header, rows = make_block(1, 0, heads=2, tokens=512, width=128)
    reused = [bytearray(row) for row in rows]
    sink.gate.clear()
    threading.Timer(0.3, sink.gate.set).start()
    for number in range(2):
        sender.send(replace(header, layer=number), [memoryview(row) for row in reused])
        for row in reused:
            row[:] = bytes(len(row))
    sink.wait(lambda: len(sink.landed) == 2)
    assert sink.landed[1, 0] == b"".join(rows)
    assert not any(sink.landed[1, 1])


def test_sessions_hear_of_their_connections_end(
    connect: Any, transport: Transport, sink: MemorySink
) -> None:
    if transport.name == "zmq":
        pytest.skip("ZeroMQ does not tell a ROUTER which peer has gone")
    leaves, stays = connect(), connect()
    for session in (1, 2):
        leaves.send(Header(Kind.ATTACH, session, 0))
    stays.send(Header(Kind.ATTACH, 3, 0))
    answers(leaves, 2)
    answers(stays, 1)
    leaves.close()
    sink.wait(lambda: sorted(sink.detachments) == [(TICKET.client, 1), (TICKET.client, 2)])


def test_several_senders_at_once(connect: Any, sink: MemorySink) -> None:
    senders = [connect() for _ in range(4)]
    work = [[make_block(s, n, tokens=300) for n in range(50)] for s in range(4)]
    threads = [
        threading.Thread(target=send_all, args=pair) for pair in zip(senders, work, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    sink.wait(lambda: len(sink.landed) == 200)
    for header, rows in itertools.chain(*work):
        assert sink.landed[header.session, header.layer] == b"".join(rows)


def test_a_slow_receiver_blocks_the_sender(connect: Any, sink: MemorySink) -> None:
    sender = connect()
    header, rows = make_block(1, 0, heads=8, tokens=1024, width=128)  # 2 MiB
    sink.gate.clear()
    sent = []

    def send_many() -> None:
        for number in range(100):
            sender.send(replace(header, layer=number), rows)
            sent.append(number)

    thread = threading.Thread(target=send_many)
    thread.start()
    before = -1
    while len(sent) > before:
        before = len(sent)
        time.sleep(0.7)
    # Nothing has landed, so all that was sent waits somewhere: at most 64 MiB.
    assert len(sent) <= 32
    sender.replies()
    assert thread.is_alive() and not sink.landed, "replies() waited for send()"
    sink.gate.set()
    thread.join(60)
    sink.wait(lambda: len(sink.landed) == 100)


def test_many_tiny_frames(connect: Any, sink: MemorySink) -> None:
    sender = connect()
    blocks = [make_block(1, n, heads=1, tokens=1, width=1) for n in range(2000)]
    send_all(sender, blocks)
    sink.wait(lambda: len(sink.landed) == 2000)
    assert all(sink.landed[1, h.layer] == bytes(rows[0]) for h, rows in blocks)


def test_the_largest_frame(connect: Any, sink: MemorySink) -> None:
    sender = connect()
    header, rows = make_block(1, 0, heads=8, tokens=32768, width=128)
    assert header.payload_bytes == MAX_PAYLOAD
    sender.send(header, rows)
    sender.send(*make_block(1, 1))
    sink.wait(lambda: len(sink.landed) == 2)
    assert sink.landed[1, 0] == b"".join(rows)


def test_attach_is_answered(connect: Any) -> None:
    sender = connect()
    for session in (5, REFUSED, LATER):
        sender.send(Header(Kind.ATTACH, session, 0))
    found = {reply.session: reply for reply in answers(sender, 3)}
    assert found[5].accepted and found[LATER].accepted
    assert found[REFUSED] == DataReply(REFUSED, False, E_SESSION, "not here")
    assert sender.replies() == []


def test_a_refused_block_is_thrown_away(connect: Any, sink: MemorySink) -> None:
    sender = connect()
    sender.send(*make_block(REFUSED, 0, tokens=5000, width=64))
    sender.send(*make_block(1, 0))
    sink.wait(lambda: bool(sink.landed))
    assert sink.refusals == [(REFUSED, E_SESSION)]
    assert list(sink.landed) == [(1, 0)]


def test_a_checksum_is_compared(connect: Any, sink: MemorySink) -> None:
    sender = connect()
    header, rows = make_block(1, 0)
    good = xxh3_64_intdigest(b"".join(rows)) & 0xFFFFFFFF
    sender.send(replace(header, checksum=good ^ 1, layer=3), rows)
    sender.send(replace(header, checksum=good), rows)
    sink.wait(lambda: bool(sink.landed))
    assert sink.refusals == [(1, E_BLOCK)]
    assert list(sink.landed) == [(1, 0)]
    assert sink.aborted == 1 and sink.pending == 0


@pytest.mark.parametrize("wrong", ["client", "key"])
def test_a_wrong_ticket_is_refused(connect: Any, sink: MemorySink, wrong: str) -> None:
    ticket = msgspec.structs.replace(TICKET, **{wrong: getattr(new_ticket(), wrong)})
    with pytest.raises(TransportError, match=r"127\.0\.0\.1:"):
        sender = connect(ticket, timeout=TIMEOUT)
        sender.send(*make_block(1, 0))
        raise until_refused(sender, TIMEOUT)
    sender = connect()
    sender.send(*make_block(1, 1))
    sink.wait(lambda: bool(sink.landed))
    assert list(sink.landed) == [(1, 1)]


def test_a_proof_for_another_listener_is_worth_nothing(
    transport: Transport, listener: Listener, sink: MemorySink
) -> None:
    if transport.name != "zmq":
        pytest.skip("elsewhere a proof is for one connection")
    endpoint = msgspec.structs.replace(listener.endpoint, nonce=new_nonce())
    with pytest.raises(TransportError, match="refused the credentials"):
        transport.connect(endpoint, TICKET, TIMEOUT)


def test_the_sink_hears_whose_frames_they_are(connect: Any, sink: MemorySink) -> None:
    for ticket, session in ((TICKET, 1), (OTHER, 2)):
        sender = connect(ticket)
        sender.send(Header(Kind.ATTACH, session, 0))
        sender.send(*make_block(session, 0))
    sink.wait(lambda: len(sink.landed) == 2)
    assert sink.owners == {(1, 0): TICKET.client, (2, 0): OTHER.client}
    assert sorted(sink.attachments) == sorted([(TICKET.client, 1), (OTHER.client, 2)])


def _forgeries() -> dict[str, tuple[Any, list[memoryview]]]:
    header, rows = make_block(1, 0)
    raw = header.pack()
    large = replace(header, payload_bytes=MAX_PAYLOAD + 4096)
    return {
        "magic": (Forged(b"EVIL" + raw[4:]), []),
        "version": (Forged(raw[:4] + b"\xff\xff" + raw[6:]), []),
        "kind": (Forged(raw[:6] + b"\x63" + raw[7:]), []),
        "dtype": (Forged(raw[:7] + b"\xfe" + raw[8:]), []),
        "oversize": (Forged(large.pack()), []),
        "lie": (replace(header, tokens=header.tokens + 1), rows),
        "reply": (Header(Kind.REPLY, 1, 0), []),
        "credit": (Header(Kind.CREDIT, 1, 0), []),
        "attach": (Forged(Header(Kind.ATTACH, 1, 4096).pack()), []),
    }


@pytest.mark.parametrize("what", list(_forgeries()))
def test_a_forged_frame_ends_the_connection(connect: Any, sink: MemorySink, what: str) -> None:
    sender, other = connect(timeout=TIMEOUT), connect()
    with pytest.raises(TransportError):
        sender.send(*_forgeries()[what])
        raise until_refused(sender, TIMEOUT + 5)
    other.send(*make_block(2, 0))
    sink.wait(lambda: (2, 0) in sink.landed)
    assert list(sink.landed) == [(2, 0)]


@pytest.mark.parametrize("kind", [Kind.ATTACH, Kind.BLOCK])
def test_a_fault_of_the_receiver_ends_one_connection(
    connect: Any, sink: MemorySink, kind: Kind
) -> None:
    sender, other = connect(timeout=TIMEOUT), connect(OTHER)
    with pytest.raises(TransportError):
        if kind is Kind.BLOCK:
            sender.send(*make_block(FAULTY, 0))
        else:
            sender.send(Header(kind, FAULTY, 0))
        raise until_refused(sender, TIMEOUT + 5)
    other.send(*make_block(2, 0))
    sink.wait(lambda: (2, 0) in sink.landed)
    connect().send(*make_block(2, 1))
    sink.wait(lambda: (2, 1) in sink.landed)


def test_a_receiver_that_goes_away(connect: Any, listener: Listener) -> None:
    sender = connect(timeout=TIMEOUT)
    sender.send(*make_block(1, 0))
    closing = threading.Thread(target=listener.close)
    closing.start()
    began = time.monotonic()
    error = until_refused(sender, TIMEOUT + 5)
    assert time.monotonic() - began < TIMEOUT + 2, error
    with pytest.raises(TransportError):
        sender.send(*make_block(1, 1))
    with pytest.raises(TransportError):
        sender.replies()
    closing.join()


def test_a_receiver_that_takes_nothing(connect: Any, sink: MemorySink) -> None:
    sender = connect(timeout=TIMEOUT)
    header, rows = make_block(1, 0, heads=8, tokens=1024, width=128)
    sink.gate.clear()
    with pytest.raises(TransportError):
        for _ in range(100):
            before = time.monotonic()
            sender.send(header, rows)
    assert TIMEOUT - 0.5 < time.monotonic() - before < TIMEOUT + 5


def test_a_sender_that_dies_inside_a_frame(
    connect: Any, sink: MemorySink, listener: Listener
) -> None:
    told = [msgspec.json.encode(what).decode() for what in (listener.endpoint, TICKET)]
    command = [sys.executable, "-c", _SENDS_FOREVER, *told]
    with subprocess.Popen(command) as doomed:
        sink.wait(lambda: len(sink.order) >= 3, seconds=60)
        doomed.kill()
    sink.wait(lambda: sink.pending == 0)
    other = connect()
    other.send(*make_block(2, 0))
    sink.wait(lambda: (2, 0) in sink.landed)


def test_nobody_is_there(transport: Transport) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        listener = transport.listen("127.0.0.1", 0, MemorySink())
        endpoint = listener.endpoint
        listener.close()
        began = time.monotonic()
        with pytest.raises(TransportError, match=f"127.0.0.1:{endpoint.port}"):
            transport.connect(endpoint, TICKET, TIMEOUT)
        assert time.monotonic() - began < TIMEOUT + 5


def test_a_port_in_use(transport: Transport, listener: Listener, sink: MemorySink) -> None:
    with pytest.raises(OSError) as raised:
        transport.listen("127.0.0.1", listener.endpoint.port, sink)
    assert raised.value.errno


def test_an_unspecified_host_is_announced_empty(transport: Transport, sink: MemorySink) -> None:
    listener = transport.listen("0.0.0.0", 0, sink)
    try:
        assert listener.endpoint.transport == transport.name
        assert listener.endpoint.host == "" and listener.endpoint.port
    finally:
        listener.close()


def test_closing_is_prompt_and_final(connect: Any, listener: Listener) -> None:
    sender = connect()
    sender.send(*make_block(1, 0))
    began = time.monotonic()
    listener.close()
    assert time.monotonic() - began < 4
    sender.close()
    sender.close()
    with pytest.raises(TransportError):
        sender.send(*make_block(1, 1))
