"""Registers the built-in bulk transport."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlx_receiver.wire.hooks import hookimpl

if TYPE_CHECKING:
    from mlx_receiver.wire.transport import Transport


@hookimpl
def mac_decode_transports() -> list[Transport]:
    """The ``tcp`` transport."""
    from mlx_receiver.wire.tcp import TcpTransport

    return [TcpTransport()]
