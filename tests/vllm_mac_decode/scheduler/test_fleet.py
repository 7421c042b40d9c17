"""Several receivers at once: who is connected, who is not, and what is said of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from mlx_receiver.pairing.keystore import PairingError
from mlx_receiver.wire import codec
from mlx_receiver.wire import messages as m
from mlx_receiver.wire.keys import new_ticket, of_token
from tests.conftest import free_port
from tests.vllm_mac_decode.scheduler.test_link import ME, Peer, lines
from tests.waiting import eventually
from vllm_mac_decode.scheduler import link as link_module
from vllm_mac_decode.scheduler.candidates import Candidate
from vllm_mac_decode.scheduler.fleet import Fleet
from vllm_mac_decode.scheduler.relay import Relay
from vllm_mac_decode.scheduler.remote import Remote
from vllm_mac_decode.settings import MOST_RECEIVERS, Settings

__all__ = ["lines"]


class Mac(Peer):
    """A receiver with a name, which notes who says Hello."""

    def __init__(self, name: str, refuses: bool = False) -> None:
        self.name, self.refuses, self.hellos = name, refuses, 0
        super().__init__(self._say)

    def _say(self, message: m.ClientMessage) -> list[bytes]:
        if isinstance(message, m.Hello):
            self.hellos += 1
            if self.refuses:
                return [codec.encode(m.Rejected(m.E_MODEL, f"{self.name} serves another model"))]
            ends = [m.Endpoint("tcp", "192.0.2.7", 9)]
            return [codec.encode(m.Welcome(self.name, "m", "e", ends, new_ticket(), 99, ["raw"]))]
        return [codec.encode(m.Status(0, 0, True, 0, []))] if isinstance(message, m.Ping) else []

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])


class Network:
    """Receivers that come and go, by their names."""

    def __init__(self, **found: Mac) -> None:
        self.found, self.error = found, ""

    def receivers(self) -> list[str]:
        if self.error:
            raise PairingError(self.error)
        return list(self.found)

    def ways(self, receiver: str) -> list[Candidate]:
        there = self.found.get(receiver)
        if there is None:
            return []
        return [Candidate(there.address, "127.0.0.1", there.port, of_token(""))]

    def hosts(self, candidate: Candidate) -> list[str]:
        return []

    def none(self) -> str:
        return "there is no receiver"

    def close(self) -> None: ...


@contextmanager
def fleet(receivers: str = "") -> Iterator[Relay]:
    settings = Settings(receiver=receivers, stall_timeout=1.0)
    relay = Relay(settings)
    others = set(threading.enumerate())  # what earlier tests have left may still be ending
    made = Fleet(settings, ME, relay.join)
    try:
        yield relay
    finally:
        made.close()
        left = [t.name for t in set(threading.enumerate()) - others]
        left = [name for name in left if name.startswith("mac-decode-")]
        assert not left and not relay._receivers


def connected(relay: Relay) -> set[str]:
    return {r.welcome.receiver for r in relay._receivers if r.welcome is not None}


def numbers(relay: Relay) -> set[int]:
    targets = [r.link.target for r in relay._receivers if r.link is not None]
    return {target.number for target in targets if target is not None}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "_RETRY_SECONDS", (0.1, 0.2))
    monkeypatch.setattr(link_module, "_REJECTED_SECONDS", 0.2)


def discovered(monkeypatch: pytest.MonkeyPatch, network: Network) -> None:
    monkeypatch.setattr("vllm_mac_decode.scheduler.fleet.candidates", lambda _: network)


def test_all_that_are_named_are_connected_and_one_that_is_lost_leaves_the_others(
    lines: Callable[[], list[str]],
) -> None:
    a, b = Mac("a"), Mac("b")
    with fleet(f"{a.address}, {b.address}") as relay:
        assert eventually(lambda: connected(relay) == {"a", "b"})
        assert numbers(relay) == {0, 1}, "workers tell them apart"
        a.close()
        assert eventually(lambda: connected(relay) == {"b"})
        time.sleep(0.7)
        assert connected(relay) == {"b"} and b.hellos == 1
        b.close()
        assert eventually(lambda: any("decoding locally" in line for line in lines()))
    said = lines()
    assert sum("lost the receiver" in line for line in said) == 2
    assert sum("decoding locally" in line for line in said) == 1


def test_a_receiver_with_two_names_is_connected_once(lines: Callable[[], list[str]]) -> None:
    a = Mac("a")
    with fleet(f"{a.address},localhost:{a.port}") as relay:
        assert eventually(lambda: connected(relay) == {"a"} and a.hellos == 2)
        time.sleep(1)
        assert len(numbers(relay)) == 1 and a.hellos == 2, "the other waits, and asks nothing"
        assert not lines(), "which is no trouble"
        # The one that is connected is lost to this side alone; then the other takes its place.
        (first,) = [r for r in relay._receivers if r.welcome is not None]
        assert first.link is not None
        first.link.close()
        assert eventually(lambda: connected(relay) == {"a"} and first.welcome is None), (
            "the other name is used"
        )
    a.close()


def test_one_that_refuses_is_named_once_and_does_not_stop_the_others(
    lines: Callable[[], list[str]],
) -> None:
    a, b = Mac("a", refuses=True), Mac("b")
    with fleet(f"{a.address},{b.address}") as relay:
        assert eventually(lambda: connected(relay) == {"b"} and a.hellos > 2)
        assert eventually(lambda: bool(lines()))
        time.sleep(0.5)
    assert len(lines()) == 1
    assert "one receiver is not used" in lines()[0] and "a serves another model" in lines()[0]
    a.close()
    b.close()


def test_why_none_is_connected_is_said_in_one_line(lines: Callable[[], list[str]]) -> None:
    a = Mac("a", refuses=True)
    nobody = free_port()
    with fleet(f"{a.address},127.0.0.1:{nobody}"):
        assert eventually(lambda: bool(lines()))
        time.sleep(1)
    assert len(lines()) == 1, lines()
    assert "a serves another model" in lines()[0] and f"127.0.0.1:{nobody}" in lines()[0]
    a.close()


def test_receivers_come_and_go(
    monkeypatch: pytest.MonkeyPatch, lines: Callable[[], list[str]]
) -> None:
    a, b = Mac("a"), Mac("b")
    network = Network()
    discovered(monkeypatch, network)
    with fleet() as relay:
        assert eventually(lambda: bool(lines()))
        assert "there is no receiver" in lines()[0]
        network.found = {"mini": a}
        assert eventually(lambda: connected(relay) == {"a"})
        network.found = {"studio": b}
        assert eventually(lambda: connected(relay) == {"a", "b"})
        time.sleep(0.6)
        # What is announced is a hint: a connection that stands is not given up for it.
        assert connected(relay) == {"a", "b"}
        a.close()
        assert eventually(lambda: len(relay._receivers) == 1), "now it is"
        assert connected(relay) == {"b"}
        network.found = {}
    b.close()
    assert sum("there is no receiver" in line for line in lines()) == 1


def test_there_is_an_end_to_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    macs = {f"m{i}": Mac(f"m{i}") for i in range(MOST_RECEIVERS + 2)}
    discovered(monkeypatch, Network(**macs))
    with fleet() as relay:
        assert eventually(lambda: len(connected(relay)) == MOST_RECEIVERS, 20)
        time.sleep(0.5)
        assert len(relay._receivers) == MOST_RECEIVERS
        assert numbers(relay) == set(range(MOST_RECEIVERS))
    for mac in macs.values():
        mac.close()


def test_those_that_lead_nowhere_do_not_keep_others_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Announcements that anybody may have made."""
    real = Mac("real")
    network = Network()
    nobody = {f"n{i}": free_port() for i in range(MOST_RECEIVERS + 3)}
    discovered(monkeypatch, network)

    def ways(receiver: str) -> list[Candidate]:
        port = real.port if receiver == "real" else nobody[receiver]
        return [Candidate(receiver, "127.0.0.1", port, of_token(""))]

    monkeypatch.setattr(network, "receivers", lambda: [*nobody, "real"])
    monkeypatch.setattr(network, "ways", ways)
    with fleet() as relay:
        assert eventually(lambda: connected(relay) == {"real"}, 30)
        time.sleep(1)
        assert connected(relay) == {"real"} and real.hellos == 1
        assert len(relay._receivers) <= MOST_RECEIVERS
    real.close()


def test_a_link_that_cannot_begin_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    a = Mac("a")
    discovered(monkeypatch, Network(mini=a))
    monkeypatch.setattr("vllm_mac_decode.scheduler.fleet._LOOK_SECONDS", 0.02)
    faults = [OSError("too many open files")] * 3
    made = link_module.Link

    def link(*arguments: object) -> object:
        if faults:
            raise faults.pop()
        return made(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("vllm_mac_decode.scheduler.fleet.Link", link)
    with fleet() as relay:
        assert eventually(lambda: connected(relay) == {"a"})
        assert len(relay._receivers) == 1
    a.close()


def test_a_folder_of_keys_that_cannot_be_read_is_named(
    monkeypatch: pytest.MonkeyPatch, lines: Callable[[], list[str]]
) -> None:
    a = Mac("a")
    network = Network(mini=a)
    network.error = "the folder of keys cannot be read"
    discovered(monkeypatch, network)
    with fleet() as relay:
        assert eventually(lambda: bool(lines()))
        network.error = ""
        assert eventually(lambda: connected(relay) == {"a"})
        network.error = "the folder of keys cannot be read"
        time.sleep(0.6)
        assert connected(relay) == {"a"}, "it lost its keys, not its connection"
    assert [line for line in lines() if "folder of keys" in line] == lines()
    assert len(lines()) == 1
    a.close()


def test_a_fault_in_the_looking_does_not_end_it(
    monkeypatch: pytest.MonkeyPatch, lines: Callable[[], list[str]]
) -> None:
    a = Mac("a")
    network = Network(mini=a)
    broken = [True]

    def receivers() -> list[str]:
        if broken:
            broken.clear()
            raise RuntimeError("a fault of ours")
        return list(network.found)

    monkeypatch.setattr(network, "receivers", receivers)
    monkeypatch.setattr("vllm_mac_decode.scheduler.fleet._LOOK_SECONDS", 0.05)
    discovered(monkeypatch, network)
    with fleet() as relay:
        assert eventually(lambda: connected(relay) == {"a"})
    a.close()


def test_the_log_names_who_keeps_failing(lines: Callable[[], list[str]]) -> None:
    a, b = Mac("a"), Mac("b")
    with fleet(f"{a.address},{b.address}") as relay:
        assert eventually(lambda: connected(relay) == {"a", "b"})
        failing = relay._receivers[0]
        assert isinstance(failing, Remote)
        for _ in range(3):
            failing.failed()
        assert f"hand-offs to {a.address} keep failing" in lines()[0]
        assert relay._receivers[1].local_reason(3) == ""
    a.close()
    b.close()
