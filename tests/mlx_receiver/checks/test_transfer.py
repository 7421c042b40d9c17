"""Blocks over the real transport, and over ones that misbehave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mlx_receiver.checks import transfer
from mlx_receiver.transports.tcp import TcpTransport
from mlx_receiver.transports.transport import TransportError
from mlx_receiver.wire.frames import Header


class Misbehaving(TcpTransport):
    """Sends other than what it is given."""

    def __init__(self, change: Callable[[Header, Any], tuple[Header, Any] | None]) -> None:
        super().__init__()
        self._change = change

    def connect(self, *arguments: Any) -> Any:
        sender = super().connect(*arguments)
        send, change = sender.send, self._change

        def changed(header: Header, payload: Any = ()) -> None:
            sent = change(header, payload)
            if sent is not None:
                send(*sent)

        sender.send = changed  # type: ignore[method-assign]
        return sender


def test_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_LINK", 1.0)
    found = transfer.check_loopback()
    assert found.state == "fine", found
    assert found.figures["GB/s"]
    monkeypatch.setattr(transfer, "_LINK", 1e15)
    assert transfer.check_loopback().state == "warning"


def test_loopback_notices_other_bytes_lost_blocks_and_refusals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transfer, "_ROUNDS", 1)
    monkeypatch.setattr(transfer, "_SECONDS", 1.0)

    def spoil(header: Header, payload: Any) -> tuple[Header, Any]:
        if header.layer == 3 and header.token_start:
            payload = [memoryview(bytes(part.nbytes)) for part in payload]
        return header, payload

    found = transfer.check_loopback(Misbehaving(spoil))
    assert (found.state, found.seen) == ("wrong", "MLX holds other bytes than were sent")

    def lose(header: Header, payload: Any) -> tuple[Header, Any] | None:
        return None if header.layer == 3 else (header, payload)

    found = transfer.check_loopback(Misbehaving(lose))
    assert (found.state, found.seen) == ("wrong", "not every block arrived")

    def fail(header: Header, payload: Any) -> None:
        raise TransportError("the connection broke")

    found = transfer.check_loopback(Misbehaving(fail))
    assert (found.state, found.seen) == ("wrong", "the connection broke")
