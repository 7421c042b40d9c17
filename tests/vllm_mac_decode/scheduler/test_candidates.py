"""Which receivers are tried, in which order, and with which keys."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import zmq

from mlx_receiver.discovery.browse import Found, Way
from mlx_receiver.discovery.service import Announced
from mlx_receiver.pairing.keystore import STATE_VARIABLE, Keystore, PairingError, Peer, instance_of
from mlx_receiver.wire import keys
from mlx_receiver.wire.messages import PROTOCOL_VERSION
from vllm_mac_decode.scheduler.candidates import (
    Candidate,
    Candidates,
    Discovered,
    Typed,
    candidates,
)
from vllm_mac_decode.settings import Settings

OPEN = keys.of_token("")


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path))


def a_key() -> str:
    return zmq.curve_keypair()[0].decode()


def paired(name: str, address: str) -> Peer:
    peer = Peer(name, a_key(), address=address)
    Keystore("vllm").add(peer)
    return peer


def service(name: str, key: str, *hosts: str, port: int = 7790) -> Found:
    said = Announced(PROTOCOL_VERSION, instance_of(key), name, key=key, paired=True)
    return Found(said, port, tuple(Way(host, "en0", "wired") for host in hosts), time.monotonic())


def discovered(monkeypatch: pytest.MonkeyPatch, *found: Found, token: str = "") -> Discovered:
    made = candidates(Settings(discovery=False, token=token))
    assert isinstance(made, Discovered)
    monkeypatch.setattr(made, "_browser", Network(list(found)))
    return made


class Network:
    """What is announced."""

    def __init__(self, services: list[Found]) -> None:
        self.services = services

    def found(self) -> list[Found]:
        return self.services

    def wait(self, seconds: float) -> bool:
        return True


def ways(network: Candidates) -> list[Candidate]:
    """To all receivers."""
    return [way for receiver in network.receivers() for way in network.ways(receiver)]


def places(found: list[Candidate]) -> list[tuple[str, int]]:
    return [(candidate.host, candidate.port) for candidate in found]


def test_a_typed_address_with_a_token_has_that_tokens_keys() -> None:
    (only,) = ways(Typed(Settings(receiver="10.0.0.2", token="t")))
    assert (only.host, only.port, only.keys) == ("10.0.0.2", 7790, keys.of_token("t"))


def test_a_typed_address_of_another_machine_wants_a_pairing() -> None:
    typed = Typed(Settings(receiver="10.0.0.2:7000"))
    # The keys that everybody knows are not for a network.
    with pytest.raises(PairingError, match=r"pair CODE --receiver 10\.0\.0\.2:7000"):
        ways(typed)
    other = paired("studio", "10.0.0.3:7790")
    right = paired("mini", "10.0.0.2:7000")
    tried = [candidate.keys.receiver_public.decode() for candidate in ways(typed)]
    assert tried == [right.key, other.key], "the one that was paired at that address first"
    assert {c.keys.public.decode() for c in ways(typed)} == {Keystore("vllm").identity().public}


def test_this_machine_needs_none() -> None:
    for address in ("127.0.0.1:7000", "localhost:7000", "[::1]:7000"):
        first = ways(Typed(Settings(receiver=address)))[0]
        assert first.keys == OPEN and first.port == 7000
    local = Keystore("receiver").identity()
    tried = [c.keys.receiver_public for c in ways(Typed(Settings(receiver="127.0.0.1")))]
    assert tried == [OPEN.receiver_public, local.public.encode()]


def test_a_folder_that_cannot_be_used_does_not_stop_a_receiver_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container without a home, say."""
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "none" / "such"))
    assert [c.keys for c in ways(Typed(Settings(receiver="127.0.0.1")))] == [OPEN]


def test_what_is_found_and_paired_is_tried_at_each_of_its_addresses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peer = paired("studio", "")
    network = discovered(
        monkeypatch,
        service("stranger", a_key(), "10.0.0.9"),
        service("studio", peer.key, "10.0.0.2", "fe80::1%en0"),
    )
    found = ways(network)
    assert places(found)[:2] == [("10.0.0.2", 7790), ("fe80::1%en0", 7790)]
    assert {c.keys.receiver_public.decode() for c in found[:2]} == {peer.key}
    assert not [c for c in found if c.host == "10.0.0.9"], "nobody who is not paired"
    assert found[0].name == "studio (10.0.0.2:7790)"
    assert network.hosts(found[0]) == ["10.0.0.2", "fe80::1%en0"]
    assert places(found)[-1] == ("127.0.0.1", 7790), "also where multicast is blocked"


def test_what_is_found_and_not_paired_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    network = discovered(monkeypatch, service("studio\x1b[2J", a_key(), "10.0.0.2"))
    assert places(ways(network)) == [("127.0.0.1", 7790)]
    assert "found, but not paired" in network.none()
    assert "\x1b" not in network.none()
    assert "no receiver is found" in discovered(monkeypatch).none()


def test_a_token_is_tried_with_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    network = discovered(monkeypatch, service("studio", a_key(), "10.0.0.2"), token="t")
    assert {candidate.keys for candidate in ways(network)} == {keys.of_token("t")}
    assert places(ways(network))[0] == ("10.0.0.2", 7790)


def test_a_receiver_of_this_machine_is_found_with_its_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    open_key = OPEN.receiver_public.decode()
    network = discovered(monkeypatch, service("here", open_key, "127.0.0.1", port=7001))
    assert (ways(network)[0].port, ways(network)[0].keys) == (7001, OPEN)
    mine = Keystore("receiver").identity().public
    network = discovered(monkeypatch, service("here", mine, "10.0.0.5", port=7002))
    first = ways(network)[0]
    assert (first.host, first.port) == ("127.0.0.1", 7002), "only loopback needs no pairing"
    assert first.keys.receiver_public.decode() == mine
    # The open keys are for this machine, whoever announces them on the network.
    network = discovered(monkeypatch, service("liar", open_key, "10.0.0.9"))
    assert not [c for c in ways(network) if c.host == "10.0.0.9"]


def test_without_discovery_nothing_is_looked_for() -> None:
    made = candidates(Settings(discovery=False))
    assert isinstance(made, Discovered)
    assert places(ways(made)) == [("127.0.0.1", 7790)]
    assert made.hosts(ways(made)[0]) == []
    made.close()
