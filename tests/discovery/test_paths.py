"""Two cables of different rate between two machines: KV takes the faster one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from mlx_receiver.transports.tcp_listener import TcpListener
from mlx_receiver.wire.keys import new_ticket
from mlx_receiver.wire.messages import DataPath, Endpoint
from tests.discovery.hosts import Host, two_hosts
from tests.waiting import eventually
from tests.wire.sink import TICKET, MemorySink
from vllm_mac_decode.export import DataTarget
from vllm_mac_decode.scheduler import paths
from vllm_mac_decode.scheduler.paths import PROBE_BYTES, Paths, measure

#: Mbit/s of the two cables.
RATES = (200, 2000)


@contextmanager
def listening() -> Iterator[tuple[Host, Host, DataTarget, list[str]]]:
    """A listener at the second host, the way to it over the first cable, and both addresses."""
    with two_hosts(cables=2) as (spark, mac):
        for cable, mbits in enumerate(RATES):
            spark.shape(cable, mbits)
        listener = mac.run(TcpListener, "*", 0, MemorySink())
        try:
            hosts = [mac.address(cable, 4) for cable in range(2)]
            endpoint = Endpoint("tcp", hosts[0], listener.endpoint.port)
            yield spark, mac, DataTarget(endpoint, "r", TICKET), hosts
        finally:
            listener.close()


@pytest.fixture(scope="module")
def way() -> Iterator[tuple[Host, Host, DataTarget, list[str]]]:
    with listening() as found:
        yield found


Way = tuple[Host, Host, DataTarget, list[str]]


def first(chosen: Paths, spark: Host | None = None) -> DataTarget:
    """Where blocks go at first, once that is known."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        target = chosen.first() if spark is None else spark.run(chosen.first)
        if target is not None:
            return target
        time.sleep(0.01)
    raise AssertionError("the addresses are measured for ever")


def look(chosen: Paths, spark: Host, idle: Callable[[], bool]) -> str:
    """Where blocks go now."""
    target = spark.run(chosen.look, idle())
    return target.endpoint.host if target is not None else ""


def test_each_address_is_measured_within_its_bounds(way: Way) -> None:
    spark, _, target, hosts = way
    for host, mbits in zip(hosts, RATES, strict=True):
        began = time.monotonic()
        path = spark.run(measure, host, target)
        assert time.monotonic() - began < 2.5
        assert path is not None
        # The first packets of a bucket are free.
        assert 0.5 * mbits < 8e-6 * path.rate < 1.6 * mbits, path.text
        assert 0 < path.round_trip_ns < 5e8
        assert path.mtu == 1500


def test_the_faster_one_is_taken_also_when_the_slower_comes_first(way: Way) -> None:
    spark, _, target, hosts = way
    chosen = first(Paths(target, lambda: hosts), spark)
    assert chosen.endpoint.host == hosts[1]
    assert chosen.ticket == target.ticket


def test_a_stranger_behind_an_address_gets_nothing(way: Way) -> None:
    """Whoever announces the receiver's key with an address of his own."""
    spark, mac, target, hosts = way
    stranger = mac.run(TcpListener, hosts[1], 0, MemorySink([new_ticket()]))
    try:
        false = DataTarget(Endpoint("tcp", hosts[0], stranger.endpoint.port), "r", TICKET)
        assert spark.run(measure, hosts[1], false) is None
    finally:
        stranger.close()
    assert spark.run(measure, "10.232.0.77", target) is None  # nobody at all


def test_a_faster_cable_that_appears_later_is_taken_between_sessions(
    way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "_LOOK_SECONDS", 0.1)
    spark, _, target, hosts = way
    known = hosts[:1]
    chosen = Paths(target, lambda: known)
    assert first(chosen, spark).endpoint.host == hosts[0]
    assert not eventually(lambda: bool(look(chosen, spark, lambda: True)), 1)
    known = hosts
    # Not while blocks are on their way.
    assert not eventually(lambda: bool(look(chosen, spark, lambda: False)), 3)
    assert eventually(lambda: look(chosen, spark, lambda: True) == hosts[1])


def test_the_other_cable_is_taken_when_one_breaks(
    way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "_LOOK_SECONDS", 0.1)
    monkeypatch.setattr(paths, "_DOUBT_SECONDS", 0.1)
    spark, _, target, hosts = way
    chosen = Paths(target, lambda: hosts)
    assert first(chosen, spark).endpoint.host == hosts[1]
    spark.ip("link", "set", spark.cables[1], "down")
    try:
        assert look(chosen, spark, lambda: False) == ""
        chosen.doubt()
        assert eventually(lambda: look(chosen, spark, lambda: False) == hosts[0])
    finally:
        spark.ip("link", "set", spark.cables[1], "up")


def test_where_there_is_no_choice_nothing_is_sent() -> None:
    """Loopback, one address, and transports that cannot be measured."""

    def never() -> list[str]:
        raise AssertionError("asked for other addresses")

    here = DataTarget(Endpoint("tcp", "127.0.0.1", 9), "r", TICKET)
    assert Paths(here, never).first() == here
    nixl = DataTarget(Endpoint("nixl", "10.0.0.1", 9), "r", TICKET)
    assert Paths(nixl, never).first() == nixl
    alone = DataTarget(Endpoint("tcp", "10.0.0.1", 9), "r", TICKET)
    assert first(Paths(alone, lambda: ["10.0.0.1"])) == alone


def test_a_path_says_what_it_is() -> None:
    path = DataPath("10.0.0.1", 1_200_000_000, 400_000, 9000)
    assert path.text == "10.0.0.1 (9.60 Gbit/s, 0.4 ms, MTU 9000)"
    assert PROBE_BYTES <= 64 << 20
