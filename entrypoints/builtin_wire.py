"""Registers the built-in data transports."""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING

from mlx_receiver.plugins import hookimpl

if TYPE_CHECKING:
    from mlx_receiver.transports.transport import Transport


@hookimpl(trylast=True)
def mac_decode_transports() -> list[Transport]:
    """``tcp``, ``zmq``, and ``nixl`` where the package is installed (it is imported when used)."""
    from mlx_receiver.transports.tcp import TcpTransport
    from mlx_receiver.transports.zmq import ZmqTransport

    transports: list[Transport] = [TcpTransport(), ZmqTransport()]
    if sys.platform == "linux" and importlib.util.find_spec("nixl") is not None:
        from mlx_receiver.transports.nixl import NixlTransport

        transports.append(NixlTransport())
    return transports
