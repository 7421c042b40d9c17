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


@contextmanager
def seldom(pause: float) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "_AGAIN_PAUSE", pause)
        yield


def test_the_way_that_is_used_is_measured_again(way: Way) -> None:
    """What its link carries has changed; where blocks go has not."""
    spark, _, target, hosts = way
    chosen = Paths(target, lambda: [])
    assert first(chosen, spark) == target
    before = chosen.used
    assert before is not None and before.host == hosts[0]
    spark.shape(0, 20 * RATES[0])
    try:
        with seldom(0.0):
            spark.run(chosen.again)
            assert eventually(lambda: chosen.used is not before, 10, 0.01)
    finally:
        spark.shape(0, RATES[0])
    after = chosen.used
    assert after is not None and after.host == hosts[0] and after.rate > 3 * before.rate
    assert look(chosen, spark, lambda: True) == "", "the way stays"


def test_a_slow_way_is_measured_again_with_few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def measure(host: str, target: DataTarget, nbytes: int, seconds: float) -> DataPath:
        asked.append(nbytes)
        return DataPath(host, rate, 1)

    monkeypatch.setattr(paths, "measure", measure)
    chosen = Paths(DataTarget(Endpoint("tcp", "127.0.0.1", 9), "r", TICKET), lambda: [])
    for rate in (1, 12_500_000, 1_250_000_000, 10**12):
        chosen.used = DataPath("127.0.0.1", rate, 1)
        chosen._measure_again()
    assert asked == [256 << 10, 1_250_000, 16 << 20, 16 << 20]


def test_a_way_that_has_become_fast_is_measured_with_more_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is sent first is over before TCP is fast: a hundredth of a second's bytes pass at a
    tenth of the rate."""
    asked: list[int] = []

    def measure(host: str, target: DataTarget, nbytes: int, seconds: float) -> DataPath:
        asked.append(nbytes)
        return DataPath(host, int(min(100 * nbytes, 1.25e9)), 1)

    monkeypatch.setattr(paths, "measure", measure)
    chosen = Paths(DataTarget(Endpoint("tcp", "127.0.0.1", 9), "r", TICKET), lambda: [])
    chosen.used = DataPath("127.0.0.1", 12_500_000, 1)
    chosen._measure_again()
    assert asked == [1_250_000, 12_500_000, 16 << 20]
    assert chosen.used == DataPath("127.0.0.1", int(1.25e9), 1)
    asked.clear()
    chosen.used = DataPath("127.0.0.1", 100, 1)
    monkeypatch.setattr(paths, "_AGAIN_BYTES", (1, 1 << 40))
    chosen._measure_again()
    assert len(asked) == paths._AGAIN_TIMES, "not for ever"


def test_it_is_not_measured_all_the_time() -> None:
    """Of an address of this machine, too, which is no choice."""
    listener = TcpListener("127.0.0.1", 0, MemorySink())
    try:
        chosen = Paths(DataTarget(listener.endpoint, "r", TICKET), lambda: [])
        assert chosen.first() is not None and chosen.used is None
        chosen.again()
        assert eventually(lambda: chosen.used is not None, 10, 0.01)
        used = chosen.used
        for _ in range(20):
            chosen.again()
        time.sleep(0.3)
        assert chosen.used is used
        with seldom(0.0):
            chosen.again()
            assert eventually(lambda: chosen.used is not used, 10, 0.01)
    finally:
        listener.close()
    with seldom(0.0):
        used = chosen.used
        assert eventually(lambda: chosen._thread is None, 10, 0.01)
        chosen.again()
        assert eventually(lambda: chosen._thread is None, 10, 0.01)
        assert chosen.used is used, "nobody is there any more"
