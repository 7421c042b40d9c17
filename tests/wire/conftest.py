"""A ``tcp`` listener that lands blocks in plain memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mlx_receiver.transports.tcp_listener import TcpListener
from mlx_receiver.wire.frames import Level
from tests.wire.sink import MemorySink


@pytest.fixture
def sink() -> MemorySink:
    """The receiver's memory."""
    return MemorySink()


@pytest.fixture
def listener(sink: MemorySink) -> Iterator[TcpListener]:
    """The receiving end."""
    made = TcpListener("127.0.0.1", 0, sink)
    yield made
    made.close()


@pytest.fixture(params=["signed", "sealed"])
def level(request: pytest.FixtureRequest) -> Level:
    """Each level that protects anything."""
    return request.param
