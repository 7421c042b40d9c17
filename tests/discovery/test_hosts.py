"""Two machines with cables between them: network namespaces with real multicast."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Iterator, Sequence

import pytest

from mlx_receiver.discovery import listing
from mlx_receiver.discovery.announce import Announcer
from mlx_receiver.discovery.browse import Browser, Found
from mlx_receiver.wire import addresses
from tests.discovery.hosts import Host, command, plug_in, two_hosts
from tests.discovery.test_loopback import receiver
from tests.waiting import eventually


@contextlib.contextmanager
def announced_on(mac: Host, port: int = 7790, host: str = "*") -> Iterator[Announcer]:
    announcer = mac.run(Announcer, receiver(), port, host)
    try:
        yield announcer
    finally:
        mac.run(announcer.close)


@contextlib.contextmanager
def browsing_on(spark: Host) -> Iterator[Browser]:
    browser = spark.run(Browser)
    try:
        yield browser
    finally:
        spark.run(browser.close)


def ways(found: Sequence[Found]) -> dict[str, str]:
    """The interface for each address of the one that is found."""
    return {way.host: way.interface for one in found for way in one.addresses}


def accepted(host: str, port: int) -> None:
    with socket.create_connection((host, port), 2):
        pass


def test_every_address_that_is_found_leads_there() -> None:
    with two_hosts() as (spark, mac):
        servers = mac.run(addresses.listening, "*", 0)
        port = servers[0].getsockname()[1]
        expected = {mac.address(0, 4), f"{mac.address(0, 6)}%{spark.cables[0]}"}
        with browsing_on(spark) as browser:
            with announced_on(mac, port):
                assert eventually(lambda: set(ways(browser.found())) == expected)
                (found,) = browser.found()
                assert found.port == port
                assert {way.interface for way in found.addresses} == {spark.cables[0]}
                for way in found.addresses:
                    spark.run(accepted, way.host, port)
            assert eventually(lambda: not browser.found())
        for server in servers:
            server.close()


def test_ipv6_alone_is_enough() -> None:
    with two_hosts(ipv4=False) as (spark, mac):
        with announced_on(mac), browsing_on(spark) as browser:
            expected = {f"{mac.address(0, 6)}%{spark.cables[0]}": spark.cables[0]}
            assert eventually(lambda: ways(browser.found()) == expected)


def test_each_cable_has_its_own_addresses() -> None:
    with two_hosts(cables=2) as (spark, mac):
        expected = {
            host: spark.cables[n]
            for n in range(2)
            for host in (mac.address(n, 4), f"{mac.address(n, 6)}%{spark.cables[n]}")
        }
        with announced_on(mac), browsing_on(spark) as browser:
            assert eventually(lambda: ways(browser.found()) == expected)
            assert len(browser.found()) == 1


def test_a_receiver_is_announced_at_the_address_that_it_listens_on() -> None:
    with two_hosts(cables=2) as (spark, mac):
        only = mac.address(1, 4)
        with announced_on(mac, host=only), browsing_on(spark) as browser:
            assert eventually(lambda: ways(browser.found()) == {only: spark.cables[1]})
        with announced_on(mac, host="127.0.0.1"), browsing_on(spark) as browser:
            assert not eventually(lambda: bool(browser.found()), 1)
            with browsing_on(mac) as here:
                assert eventually(lambda: ways(here.found()) == {"127.0.0.1": "lo"})


def test_cables_come_and_go() -> None:
    with two_hosts() as (spark, mac), announced_on(mac), browsing_on(spark) as browser:
        first = mac.address(0, 4)
        assert eventually(lambda: first in ways(browser.found()))
        mac.ip("link", "set", mac.cables[0], "down")
        assert eventually(lambda: not browser.found())
        mac.ip("link", "set", mac.cables[0], "up")
        assert eventually(lambda: first in ways(browser.found()))
        names = [spark.place.namespace, mac.place.namespace]
        plug_in(names, ["later-a", "later-b"], 7)
        assert eventually(lambda: ways(browser.found()).get("10.232.7.2") == "later-a")
        assert len(browser.found()) == 1
        mac.ip("address", "add", "10.232.7.9/24", "dev", "later-b")
        spark.ip("address", "add", "10.232.7.8/24", "dev", "later-a")
        assert eventually(lambda: ways(browser.found()).get("10.232.7.9") == "later-a")
        mac.ip("link", "delete", "later-b")
        assert eventually(lambda: set(ways(browser.found()).values()) == {spark.cables[0]})


def no_multicast(host: Host) -> object:
    host.ip("link", "set", host.cables[0], "multicast", "off")
    return None


def port_taken(host: Host) -> object:
    def take() -> socket.socket:
        taken = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        taken.bind(("::", 5353))
        return taken

    return host.run(take)


@pytest.mark.parametrize("prevent", [no_multicast, port_taken])
def test_where_multicast_does_not_work_each_side_says_so_once(
    prevent: Callable[[Host], object], caplog: pytest.LogCaptureFixture
) -> None:
    with two_hosts() as (spark, mac):
        kept = [prevent(host) for host in (spark, mac)]
        with caplog.at_level(logging.INFO), announced_on(mac), browsing_on(spark) as browser:
            assert eventually(lambda: len(caplog.records) == 2)
            assert not eventually(lambda: len(caplog.records) != 2, 1)
            assert browser.trouble
        said = sorted(record.getMessage() for record in caplog.records)
        assert {record.levelname for record in caplog.records} == {"WARNING"}
        assert "--mac-decode-receiver" in said[0] and "--no-discovery" in said[0]
        assert "--mac-decode-receiver" in said[1]
        assert all(host.cables[0] in text for host, text in zip((mac, spark), said, strict=True))
        del kept


def test_a_firewall_that_lets_nothing_in_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    with two_hosts() as (spark, mac):
        inside = mac.place.command(["tc"])
        command(*inside, "qdisc", "add", "dev", mac.cables[0], "clsact")
        drop = ["bpf", "da", "bytecode", "1,6 0 0 2"]
        command(*inside, "filter", "add", "dev", mac.cables[0], "ingress", *drop)
        with announced_on(mac) as announcer, browsing_on(spark) as browser:
            assert eventually(lambda: bool(announcer.trouble))
            # What it says by itself is heard all the same.
            assert eventually(lambda: bool(browser.found())) and not browser.trouble
        (said,) = [record.getMessage() for record in caplog.records]
        assert f"{mac.cables[0]}: what is sent there does not come back" in said


def test_where_nothing_is_found_the_command_says_what_may_be_the_reason(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with two_hosts(cables=0) as (spark, _):
        assert spark.run(listing.list_receivers, 0.5, True) == 1
    written = capsys.readouterr()
    assert written.out == '{\n "receivers": []\n}\n'
    for word in ("firewall", "multicast", "--mac-decode-receiver"):
        assert word in written.err
