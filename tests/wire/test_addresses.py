"""Hosts with several addresses, of both IP versions, on every transport that takes one."""

from __future__ import annotations

import contextlib
import errno
import socket
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from mlx_receiver import plugins
from mlx_receiver.transports.transport import Transport, TransportError
from mlx_receiver.wire import addresses
from mlx_receiver.wire.addresses import Address
from tests.wire.sink import TICKET, MemorySink, make_block

V4, V6 = socket.AF_INET, socket.AF_INET6
NAME = "mac-studio.test"


def _link_local() -> str:
    """A link-local address of this machine with its scope, "" if it has none."""
    with contextlib.suppress(OSError), open("/proc/net/if_inet6") as lines:
        for line in lines:
            digits, _, _, scope, _, device = line.split()
            if scope == "20":
                return f"{socket.inet_ntop(V6, bytes.fromhex(digits))}%{device}"
    return ""


def _has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=V6).close()
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not _has_ipv6(), reason="this machine has no IPv6")


@pytest.fixture(params=["tcp", "zmq"])
def transport(request: pytest.FixtureRequest) -> Transport:
    """Both that open connections themselves."""
    return plugins.transport(request.param)


@pytest.fixture
def resolving(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[int, str]]]:
    """Names for ``getaddrinfo``, with the addresses of each."""
    names: dict[str, list[tuple[int, str]]] = {}
    real = socket.getaddrinfo

    def resolve(host: Any, port: Any, *rest: Any, **options: Any) -> Any:
        if host not in names:
            return real(host, port, *rest, **options)
        return [
            (family, socket.SOCK_STREAM, 6, "", (text, port) + (0, 0) * (family == V6))
            for family, text in names[host]
        ]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return names


@contextlib.contextmanager
def listening(transport: Transport, host: str) -> Iterator[tuple[MemorySink, Any]]:
    sink = MemorySink()
    # Allowed, or zmq and nixl would not go further than this machine.
    listener = transport.listen(host, 0, sink, plain=True)
    try:
        yield sink, listener.endpoint
    finally:
        listener.close()


def reach(transport: Transport, sink: MemorySink, endpoint: Any, host: str) -> None:
    """A block comes through at that host."""
    number = len(sink.order)
    sender = transport.connect(msgspec.structs.replace(endpoint, host=host), TICKET, 5.0)
    try:
        sender.send(*make_block(1, number))
        sink.wait(lambda: (1, number) in sink.landed, 10)
    finally:
        sender.close()


@needs_ipv6
@pytest.mark.parametrize("host", ["", "::", "[::]", "*"])
def test_everywhere_is_both_versions(transport: Transport, host: str) -> None:
    with listening(transport, host) as (sink, endpoint):
        assert endpoint.host == ""
        for address in ("127.0.0.1", "::1", "[::1]"):
            reach(transport, sink, endpoint, address)


@needs_ipv6
@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_one_address_of_version_6(transport: Transport, host: str) -> None:
    with listening(transport, host) as (sink, endpoint):
        assert endpoint.host == "::1"
        reach(transport, sink, endpoint, endpoint.host)
        with pytest.raises(TransportError, match=r"127\.0\.0\.1:"):
            reach(transport, sink, endpoint, "127.0.0.1")


@pytest.mark.skipif(not _link_local(), reason="no link-local address")
def test_a_link_local_address_with_its_scope(transport: Transport) -> None:
    with listening(transport, _link_local()) as (sink, endpoint):
        reach(transport, sink, endpoint, _link_local())
        reach(transport, sink, endpoint, f"[{_link_local()}]")


@needs_ipv6
def test_a_name_listens_on_all_of_its_addresses(
    transport: Transport, resolving: dict[str, list[tuple[int, str]]]
) -> None:
    # The last one is another machine's: names may go out of date.
    resolving[NAME] = [(V6, "::1"), (V4, "127.0.0.1"), (V4, "192.0.2.1")]
    with listening(transport, NAME) as (sink, endpoint):
        for address in ("::1", "127.0.0.1"):
            reach(transport, sink, endpoint, address)


@needs_ipv6
@pytest.mark.parametrize("first", ["refused", "silent", "closing"])
def test_every_address_of_a_name_is_tried(
    transport: Transport, resolving: dict[str, list[tuple[int, str]]], first: str
) -> None:
    resolving[NAME] = [(V6, "::1"), (V4, "127.0.0.1")]
    with listening(transport, "127.0.0.1") as (sink, endpoint), contextlib.ExitStack() as stack:
        if first != "refused":
            other = stack.enter_context(
                socket.create_server(("::1", endpoint.port), family=V6, backlog=4)
            )
            if first == "closing":
                other.shutdown(socket.SHUT_RDWR)
        began = time.monotonic()
        reach(transport, sink, endpoint, NAME)
        assert time.monotonic() - began < 4


def test_the_failures_of_all_addresses_are_named(
    transport: Transport, resolving: dict[str, list[tuple[int, str]]]
) -> None:
    resolving[NAME] = [(V4, "127.0.0.3"), (V4, "127.0.0.4")]
    with listening(transport, "127.0.0.1") as (sink, endpoint):
        began = time.monotonic()
        with pytest.raises(TransportError) as raised:
            reach(transport, sink, endpoint, NAME)
        assert time.monotonic() - began < 6
    for address in (NAME, "127.0.0.3", "127.0.0.4"):
        assert f"{address}:{endpoint.port}" in str(raised.value)


def test_a_name_that_does_not_exist(transport: Transport) -> None:
    with (
        listening(transport, "127.0.0.1") as (sink, endpoint),
        pytest.raises(TransportError, match=r"does-not-exist\.invalid"),
    ):
        reach(transport, sink, endpoint, "does-not-exist.invalid")


def test_a_port_that_one_address_has_not_free_is_chosen_anew(
    resolving: dict[str, list[tuple[int, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    resolving[NAME] = [(V4, "127.0.0.1"), (V4, "127.0.0.2")]
    real, taken = socket.create_server, []

    def create(address: Any, **options: Any) -> socket.socket:
        if address[0] == "127.0.0.2" and not taken:
            # Somebody was faster.
            taken.append(real(address, **options))
        return real(address, **options)

    monkeypatch.setattr(socket, "create_server", create)
    servers = addresses.listening(NAME, 0)
    assert [server.getsockname()[0] for server in servers] == ["127.0.0.1", "127.0.0.2"]
    assert len({server.getsockname()[1] for server in servers}) == 1
    with pytest.raises(OSError) as raised:
        addresses.listening(NAME, servers[0].getsockname()[1])
    assert raised.value.errno == errno.EADDRINUSE
    for server in (*servers, *taken):
        server.close()


def test_an_address_that_this_machine_has_not_got(transport: Transport) -> None:
    with pytest.raises(OSError) as raised:
        transport.listen("192.0.2.1", 0, MemorySink())
    assert raised.value.errno == errno.EADDRNOTAVAIL


def test_how_addresses_are_written() -> None:
    scope = socket.if_nameindex()[0]
    address = Address(V6, ("fe80::1", 5, 0, scope[0]))
    assert address.text == f"[fe80::1%{scope[1]}]:5"
    assert Address(V4, ("10.0.0.1", 5)).text == "10.0.0.1:5"
    assert addresses.spelled("[::1]", 5) == addresses.spelled("::1", 5) == "[::1]:5"
    assert addresses.announced("[::]") == addresses.announced("0.0.0.0") == ""
