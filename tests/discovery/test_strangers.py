"""What others on the network may send, which is anything."""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any

import msgspec
import pytest
from zeroconf import DNSAddress, DNSOutgoing, DNSPointer, DNSService, DNSText, const

from mlx_receiver.discovery.announce import Announcer
from mlx_receiver.discovery.browse import MOST_ADDRESSES, MOST_SERVICES, Browser
from mlx_receiver.discovery.service import SERVICE_TYPE, Announced, encode
from tests.discovery.hosts import Host, two_hosts
from tests.discovery.test_loopback import receiver
from tests.waiting import eventually

TTL = 60


def records(
    announced: Announced, addresses: list[str], port: int = 7790, text: bytes | None = None
) -> list[Any]:
    """A whole service, as an honest responder would announce it."""
    name = f"{announced.name} {secrets.token_hex(4)}.{SERVICE_TYPE}"
    server = f"{secrets.token_hex(4)}.local."
    said: list[Any] = [
        DNSPointer(SERVICE_TYPE, const._TYPE_PTR, const._CLASS_IN, TTL, name),
        DNSService(name, const._TYPE_SRV, const._CLASS_IN, TTL, 0, 0, port, server),
        DNSText(name, const._TYPE_TXT, const._CLASS_IN, TTL, text or encode(announced)),
    ]
    for address in map(ip_address, addresses):
        kind = const._TYPE_A if address.version == 4 else const._TYPE_AAAA
        said.append(DNSAddress(server, kind, const._CLASS_IN, TTL, address.packed))
    return said


def send(host: Host, *packets: list[Any]) -> None:
    """From that host's end of its first cable."""
    source = host.address(0, 4)

    def sending() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            any_socket.setsockopt(
                socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(source)
            )
            any_socket.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 255)
            any_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            any_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            any_socket.bind((source, 5353))
            for packet in packets:
                out = DNSOutgoing(const._FLAGS_QR_RESPONSE | const._FLAGS_AA)
                for record in packet:
                    out.add_answer_at_time(record, 0)
                for data in out.packets():
                    any_socket.sendto(data, ("224.0.0.251", 5353))

    host.run(sending)


@pytest.fixture(scope="module")
def network() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as hosts:
        yield hosts


@pytest.fixture
def browser(network: tuple[Host, Host]) -> Iterator[Browser]:
    spark, _ = network
    browser = spark.run(Browser)
    assert eventually(lambda: len(browser._names) == 3)  # the loopback and both IP versions
    yield browser
    spark.run(browser.close)


@contextlib.contextmanager
def honest(mac: Host) -> Iterator[tuple[Announcer, Announced]]:
    announced = receiver()
    announcer = mac.run(Announcer, announced, 7790)
    yield announcer, announced
    mac.run(announcer.close)


def instances(browser: Browser) -> list[str]:
    return [found.announced.instance for found in browser.found()]


def test_what_is_not_a_receiver_is_not_found(network: tuple[Host, Host], browser: Browser) -> None:
    _, mac = network
    pointer = DNSPointer(SERVICE_TYPE, const._TYPE_PTR, const._CLASS_IN, TTL, "printer.local.")
    last = receiver()
    send(
        mac,
        [pointer],
        records(receiver(), ["10.232.0.2"], port=0),
        records(receiver(), ["10.232.0.2"], text=b"\xffgarbage"),
        records(receiver(), ["10.232.0.2"], text=encode(receiver())[:-3]),
        # Addresses that would lead to this machine itself, or to nobody.
        records(receiver(), ["127.0.0.1", "::1", "224.0.0.1", "0.0.0.0", "::ffff:10.232.0.2"]),
        records(receiver(), []),
        records(last, ["10.232.0.2", "127.0.0.1"]),
    )
    assert eventually(lambda: instances(browser) == [last.instance])
    assert [way.host for way in browser.found()[0].addresses] == ["10.232.0.2"]
    assert not eventually(lambda: instances(browser) != [last.instance], 0.5)


def test_a_flood_displaces_nobody(network: tuple[Host, Host], browser: Browser) -> None:
    _, mac = network
    with honest(mac) as (announcer, announced):
        assert eventually(lambda: announced.instance in instances(browser))
        many = [f"fe80::{n:x}" for n in range(1, 60)]
        send(mac, *(records(receiver(), many) for _ in range(3 * MOST_SERVICES)))
        assert eventually(lambda: len(browser.found()) > MOST_SERVICES // 2)
        changed = msgspec.structs.replace(announced, model="org/Model")
        announcer.update(changed)
        assert eventually(lambda: changed in [found.announced for found in browser.found()])
        found = browser.found()
        assert len(found) <= MOST_SERVICES
        assert all(len(one.addresses) <= MOST_ADDRESSES for one in found)


def test_names_that_do_not_answer_make_room(
    network: tuple[Host, Host], browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, mac = network
    monkeypatch.setattr("mlx_receiver.discovery.browse._ASK_MS", 300)
    send(mac, *(records(receiver(), [])[:1] for _ in range(2 * MOST_SERVICES)))

    def asked() -> bool:
        names = [name for known in browser._names.values() for name in known.values()]
        return len(names) == MOST_SERVICES and all(name.asked for name in names)

    assert eventually(asked)
    with honest(mac) as (_, announced):
        assert eventually(lambda: instances(browser) == [announced.instance])


def test_another_key_is_another_receiver(network: tuple[Host, Host], browser: Browser) -> None:
    _, mac = network
    with honest(mac) as (_, announced):
        pretender = msgspec.structs.replace(announced, key=announced.key[::-1])
        send(mac, records(pretender, ["fe80::bad"]))
        assert eventually(lambda: len(browser.found()) == 2)
        hosts = {
            found.announced.key: [way.host for way in found.addresses] for found in browser.found()
        }
        assert [host.partition("%")[0] for host in hosts[pretender.key]] == ["fe80::bad"]
        assert not any("fe80::bad" in host for host in hosts[announced.key])
