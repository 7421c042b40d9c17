"""The control connection to receivers that are not there, are not ours, or misbehave."""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import zmq

from mlx_receiver.wire import codec
from mlx_receiver.wire import messages as m
from mlx_receiver.wire.handshake import Introduction
from mlx_receiver.wire.keys import control_keys, new_ticket, of_token
from mlx_receiver.wire.layout import full_attention
from mlx_receiver.wire.signature import ModelSignature
from tests.conftest import free_port
from tests.waiting import eventually
from vllm_mac_decode.export import DataTarget
from vllm_mac_decode.scheduler import link as link_module
from vllm_mac_decode.scheduler import paths
from vllm_mac_decode.scheduler.candidates import Candidate
from vllm_mac_decode.scheduler.control import ControlSocket
from vllm_mac_decode.scheduler.fleet import Fleet
from vllm_mac_decode.scheduler.link import Link
from vllm_mac_decode.settings import Settings

ME = Introduction(
    ModelSignature("llama", 64, 100, []), full_attention(2, 2, 16, "float32"), "test", "test"
)
TICKET = new_ticket()
WELCOME = m.Welcome("r", "m", "e", [m.Endpoint("tcp", "192.0.2.7", 9)], TICKET, 99, ["raw"])


class Events:
    """A ``fleet.Member`` that remembers."""

    link: Link

    def __init__(self) -> None:
        self.seen: queue.Queue[object] = queue.Queue()
        self.ticks = 0
        self.fault = False

    def taken(self, receiver: str) -> bool:
        return False

    def connected(self, welcome: m.Welcome) -> bool:
        self.seen.put("connected")
        return True

    def disconnected(self, reason: str) -> None:
        self.seen.put(reason)

    def message(self, message: m.ReceiverMessage, arrived: float) -> None:
        if not isinstance(message, m.Status):
            self.seen.put(message)
        if self.fault:
            raise RuntimeError("a fault of ours")

    def idle(self) -> bool:
        return True

    def tick(self, now: float) -> None:
        self.ticks += 1

    def leave(self) -> None: ...


class Peer:
    """A receiver's control port. ``answer`` makes, of a client's message, what is sent back."""

    def __init__(
        self,
        answer: Callable[[m.ClientMessage], list[bytes]],
        token: str = "",
        guarded: bool = True,
    ) -> None:
        self._answer = answer
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.ROUTER)
        if guarded:
            self.socket.curve_server = True
            self.socket.curve_secretkey = control_keys(token).receiver_secret
        self.address = f"127.0.0.1:{self.socket.bind_to_random_port('tcp://127.0.0.1')}"
        self._closing = False
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while not self._closing:
            if self.socket.poll(20):
                peer, packed = self.socket.recv_multipart()
                for frame in self._answer(codec.decode_client(packed)):
                    self.socket.send_multipart([peer, frame])

    def close(self) -> None:
        self._closing = True
        self._thread.join()
        self.socket.close(linger=0)
        self._context.term()


def welcoming(message: m.ClientMessage) -> list[bytes]:
    if isinstance(message, m.Hello):
        return [codec.encode(WELCOME)]
    return [codec.encode(m.Status(0, 0, True, 0, []))] if isinstance(message, m.Ping) else []


@contextmanager
def linked(
    address: str, token: str = "", stall_timeout: float = 1.0
) -> Iterator[tuple[Link, Events]]:
    """The link of the one receiver that there may be."""
    events = Events()
    settings = Settings(receiver=address, token=token, stall_timeout=stall_timeout)
    fleet = Fleet(settings, ME, lambda: events)
    try:
        assert eventually(lambda: hasattr(events, "link"))
        yield events.link, events
    finally:
        fleet.close()
        assert not events.link._thread.is_alive() and not fleet._thread.is_alive()


class Network:
    """Candidates that are the given ones, all of them ways to one receiver."""

    def __init__(self, *found: Candidate) -> None:
        self.found = list(found)

    def receivers(self) -> list[str]:
        return ["the receiver"]

    def ways(self, receiver: str) -> list[Candidate]:
        return self.found

    def hosts(self, candidate: Candidate) -> list[str]:
        return []

    def none(self) -> str:
        return "there is no receiver"

    def close(self) -> None:
        pass


def candidate(peer: Peer, host: str = "127.0.0.1") -> Candidate:
    return Candidate(peer.address, host, int(peer.address.rpartition(":")[2]), of_token(""))


def test_when_one_way_is_lost_the_next_one_is_used(
    monkeypatch: pytest.MonkeyPatch, lines: Callable[[], list[str]]
) -> None:
    first, second = Peer(welcoming), Peer(welcoming)
    network = Network(candidate(first), candidate(second))
    monkeypatch.setattr("vllm_mac_decode.scheduler.fleet.candidates", lambda _: network)
    with linked("") as (link, events):
        assert events.seen.get(timeout=20) == "connected"
        first.close()
        assert events.seen.get(timeout=20) != "connected"
        assert events.seen.get(timeout=20) == "connected"
        assert link.target is not None
        second.close()
        assert events.seen.get(timeout=20) != "connected"
        assert eventually(lambda: any("there is no receiver" in line for line in lines()))
    assert first.address in lines()[0] and second.address in lines()[1]


def test_a_receiver_is_kept_company_while_its_addresses_are_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It drops who says nothing for five seconds; addresses that lead nowhere take that long."""
    pings: list[float] = []

    def counting(message: m.ClientMessage) -> list[bytes]:
        if isinstance(message, m.Ping):
            pings.append(time.monotonic())
        return welcoming(message)

    def slow(host: str, target: DataTarget) -> None:
        time.sleep(0.8)

    peer = Peer(counting)
    network = Network(candidate(peer))
    monkeypatch.setattr(network, "hosts", lambda _: ["10.255.0.1"])
    monkeypatch.setattr("vllm_mac_decode.scheduler.fleet.candidates", lambda _: network)
    monkeypatch.setattr(paths, "is_this_machine", lambda _: False)
    monkeypatch.setattr(paths, "measure", slow)
    with linked("") as (link, events):
        assert events.seen.get(timeout=20) == "connected"
        before = len(pings)
        assert link.target is not None
    assert before >= 5, "some 12 in 1.6 seconds"
    peer.close()


def test_a_receiver_that_refuses_is_asked_at_one_of_its_addresses(
    monkeypatch: pytest.MonkeyPatch, lines: Callable[[], list[str]]
) -> None:
    heard = []

    def refusing(message: m.ClientMessage) -> list[bytes]:
        heard.append(message)
        return [codec.encode(m.Rejected(m.E_MODEL, "another model"))]

    peer = Peer(refusing)
    network = Network(candidate(peer), candidate(peer, "localhost"))
    monkeypatch.setattr("vllm_mac_decode.scheduler.fleet.candidates", lambda _: network)
    with linked(""):
        assert eventually(lambda: any("another model" in line for line in lines()))
    assert len(heard) == 1
    peer.close()


def test_who_refuses_is_not_said_to_be_a_stranger(
    monkeypatch: pytest.MonkeyPatch, lines: Callable[[], list[str]]
) -> None:
    """It was reached by the second of the keys that this machine has for it."""
    peer = Peer(lambda _: [codec.encode(m.Rejected(m.E_MODEL, "another model"))])
    right = candidate(peer)
    network = Network(replace(right, keys=of_token("another")), right)
    monkeypatch.setattr("vllm_mac_decode.scheduler.fleet.candidates", lambda _: network)
    with linked(""):
        assert eventually(lambda: bool(lines()))
    (line,) = lines()
    assert "refuses: another model" in line and "does not know this machine" not in line
    peer.close()


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.INFO)
    logging.getLogger("vllm").propagate = True
    return lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_workers_go_to_the_host_of_the_control_connection_with_the_ticket() -> None:
    peer = Peer(welcoming)
    with linked(peer.address) as (link, events):
        assert events.seen.get(timeout=20) == "connected"
        target = link.target
        assert target is not None
        assert (target.endpoint.host, target.endpoint.port) == ("127.0.0.1", 9)
        assert target.ticket == TICKET
        assert repr(TICKET.key) not in repr(target)
        assert link.send(m.Cancel(1))
    peer.close()


@pytest.mark.parametrize(("who", "complaint"), [
    ("wrong token", "does not know this machine: pair the two"),
    ("first version", "compare MAC_DECODE_TOKEN with its --token, and the versions"),
    ("http", "hangs up: is it a receiver's control port?"),
    ("mute", "takes the connection, but does not answer"),
    ("nobody", "no receiver answers at"),
])  # fmt: skip
def test_why_nobody_answers(who: str, complaint: str, lines: Callable[[], list[str]]) -> None:
    peer = server = None
    if who in ("wrong token", "first version"):
        peer = Peer(welcoming, "secret", guarded=who == "wrong token")
        address = peer.address
    elif who in ("http", "mute"):
        server = socket.create_server(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"
    else:
        address = f"127.0.0.1:{free_port()}"

    def hang_up(server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                if connection.recv(64):
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                connection.close()

    if who == "http":
        assert server is not None
        threading.Thread(target=hang_up, args=[server], daemon=True).start()
    with linked(address, "guess") as (link, events):
        assert eventually(lambda: bool(lines()))
        time.sleep(1.5)  # later attempts say nothing new
        assert len(lines()) == 1 and complaint in lines()[0]
        assert "guess" not in lines()[0]
        assert not link.send(m.Cancel(1)) and link.target is None
        assert events.ticks > 5, "the clock ticks"
    for each in (peer, server):
        if each is not None:
            each.close()


def test_every_address_of_a_name_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name of both IP versions, of which the receiver has version 4 only."""
    peer = Peer(welcoming)
    port = int(peer.address.rpartition(":")[2])
    both = [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", port, 0, 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    with linked(f"mac.example:{port}", "") as (link, _):
        assert eventually(lambda: link.target is not None)
        assert link.target is not None and link.target.endpoint.host == "127.0.0.1"
    peer.close()


BAD: dict[str, bytes] = {
    "not msgpack": b"\xc1",
    "another struct": b"\x81\xa4type\xa5hello",
    "beyond the vocabulary": codec.encode(m.Step([m.Decoded(1, 1, [100])])),
    "a second Welcome": codec.encode(WELCOME),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_is_no_message_ends_the_connection_and_not_the_thread(
    bad: str, monkeypatch: pytest.MonkeyPatch, lines: Callable[[], list[str]]
) -> None:
    monkeypatch.setattr(link_module, "_REJECTED_SECONDS", 0.2)

    def answer(message: m.ClientMessage) -> list[bytes]:
        return [BAD[bad]] if isinstance(message, m.Cancel) else welcoming(message)

    peer = Peer(answer)
    with linked(peer.address) as (link, events):
        for _ in range(2):
            assert events.seen.get(timeout=20) == "connected"
            link.send(m.Cancel(1))
            assert "broke the protocol" in str(events.seen.get(timeout=20))
            assert link.target is None
        assert len(lines()) == 2
    peer.close()


def test_a_fault_of_ours_ends_the_connection_and_not_the_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(link_module, "_RETRY_SECONDS", (0.1,))

    def answer(message: m.ClientMessage) -> list[bytes]:
        return [codec.encode(m.Opened(1))] if isinstance(message, m.Cancel) else welcoming(message)

    peer = Peer(answer)
    with linked(peer.address) as (link, events):
        assert events.seen.get(timeout=20) == "connected"
        events.fault = True
        link.send(m.Cancel(1))
        assert events.seen.get(timeout=20) == m.Opened(1)
        assert events.seen.get(timeout=20) == "the link failed"
        events.fault = False
        assert events.seen.get(timeout=20) == "connected"
    peer.close()


def test_a_receiver_that_never_stops_talking_does_not_stop_the_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peer = Peer(welcoming)
    with linked(peer.address) as (_, events):
        assert events.seen.get(timeout=20) == "connected"
        status = m.Status(0, 0, True, 0, [])
        monkeypatch.setattr(ControlSocket, "read", lambda self, vocab_size: status)
        began, before = time.monotonic(), events.ticks
        assert eventually(lambda: events.ticks - before >= 4)
        ticks = events.ticks - before
        assert ticks <= (time.monotonic() - began) / link_module._TICK_SECONDS + 1, "nor drive it"
        monkeypatch.undo()
    peer.close()


def test_a_silent_receiver_is_lost() -> None:
    peer = Peer(lambda message: welcoming(message) if isinstance(message, m.Hello) else [])
    with linked(peer.address) as (link, events):
        assert events.seen.get(timeout=20) == "connected"
        assert "silent" in str(events.seen.get(timeout=20))
        assert not link.send(m.Cancel(1))
    peer.close()


def test_others_may_send_while_it_closes() -> None:
    peer = Peer(welcoming)
    for _ in range(20):
        with linked(peer.address) as (link, events):
            events.seen.get(timeout=20)
            ends = threading.Event()

            def talk(link: Link = link, ends: threading.Event = ends) -> None:
                while not ends.is_set():
                    link.send(m.Cancel(1))

            threads = [threading.Thread(target=talk) for _ in range(2)]
            for thread in threads:
                thread.start()
            link.close()
            ends.set()
            for thread in threads:
                thread.join()
    peer.close()
