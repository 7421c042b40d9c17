"""The demo's servers end with the demo, however it ends and whatever they think of it."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vllm_mac_decode.tools.demo import services
from vllm_mac_decode.tools.demo.services import free_ports

#: A server that cannot be asked to stop; its connection ends when it does.
STUBBORN = """
import signal, socket, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
alive = socket.create_connection(("127.0.0.1", {port}))
alive.send(b"x")
time.sleep(600)
"""

DEMO = """
import sys, time
from pathlib import Path
from vllm_mac_decode.tools.demo.services import Service
service = Service("s", [sys.executable, "-c", sys.argv[1]], Path(sys.argv[2]), patience=1)
sys.stdin.readline()
service.stop()
"""


@pytest.mark.parametrize("killed", [False, True])
def test_a_server_that_ignores_sigterm(killed: bool, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(30)
        program = STUBBORN.format(port=listener.getsockname()[1])
        demo = subprocess.Popen(
            [sys.executable, "-c", DEMO, program, str(tmp_path / "log")], stdin=subprocess.PIPE
        )
        server, _ = listener.accept()
    with server, demo:
        server.settimeout(20)
        assert server.recv(1) == b"x"
        asked = time.monotonic()
        if killed:
            demo.kill()
        else:
            demo.communicate(b"\n")
        assert server.recv(1) == b""
        assert time.monotonic() - asked >= 1


def test_ports_that_no_connection_of_this_machine_is_given() -> None:
    """One that the system may give away can be gone when the server that it is for listens."""
    ports = free_ports(300)
    assert len(set(ports)) == 300
    assert max(ports) < 32_768  # where Linux's own begin


def test_a_port_in_use_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        used, free = taken.getsockname()[1], free_ports(1)[0]
        monkeypatch.setattr(services, "_candidates", iter([used, free]))
        assert free_ports(1) == [free]
