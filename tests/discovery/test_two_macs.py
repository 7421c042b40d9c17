"""Two Macs and two Sparks on one network: each Spark uses both Macs, and goes on with one."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from socket import gethostname

import pytest

from mlx_receiver.pairing.keystore import STATE_VARIABLE
from tests.discovery.hosts import Host, switched
from tests.servers import BIN, Server
from tests.waiting import eventually
from vllm_mac_decode.scheduler.fleet import Fleet
from vllm_mac_decode.scheduler.relay import Relay
from vllm_mac_decode.settings import Settings
from vllm_mac_decode.tools.check import read_model


class Mac:
    """A receiver at its machine, with keys of its own."""

    def __init__(self, host: Host, model: Path, folder: Path) -> None:
        self.host, self.folder = host, folder
        folder.mkdir()
        self.log = folder / "log"
        command = host.place.command(
            [str(BIN / "mlx-receiver"), "start", "--model", str(model), "--dtype", "float32"]
        )
        self.server = Server(command, self.log, {STATE_VARIABLE: str(folder)})

    def code(self) -> str:
        found = re.search(r"mac-decode pair (\d{4}-\d{4})", self.log.read_text())
        return found[1] if found else ""


class Spark:
    """What vLLM's engine process has, at its machine."""

    def __init__(self, host: Host, model: Path) -> None:
        self.host = host
        self.relay = Relay(Settings())
        self.fleet = host.run(Fleet, Settings(), read_model(str(model)), self.relay.join)

    def connected(self) -> set[str]:
        """Where the receivers are that new requests may go to."""
        return {
            remote.link.where
            for remote in self.relay._receivers
            if remote.link is not None and remote.link.target is not None
        }


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "sparks"
    monkeypatch.setenv(STATE_VARIABLE, str(folder))
    return folder


def test_each_spark_uses_both_and_goes_on_with_one(
    tiny_llama_path: Path, tmp_path: Path, state: Path
) -> None:
    with switched(4) as (*macs_hosts, one, other):
        macs = [
            Mac(host, tiny_llama_path, tmp_path / f"mac{n}") for n, host in enumerate(macs_hosts)
        ]
        sparks: list[Spark] = []
        try:
            for mac in macs:
                assert eventually(lambda mac=mac: bool(mac.code()), 60, 0.2), mac.server.tail()
                address = mac.host.address(0, 4)
                paired = subprocess.run(
                    one.place.command(
                        [str(BIN / "mac-decode"), "pair", mac.code(), "--receiver", address]
                    ),
                    capture_output=True, text=True, timeout=60, check=False,
                    env=os.environ | {STATE_VARIABLE: str(state)},
                )  # fmt: skip
                assert paired.returncode == 0, paired.stderr
            sparks = [Spark(host, tiny_llama_path) for host in (one, other)]
            names = [f"{gethostname()} ({host.address(0, 4)}:7790)" for host in macs_hosts]
            both, left = set(names), {names[1]}
            for spark in sparks:
                assert eventually(lambda spark=spark: spark.connected() == both, 40), both
            macs[0].server.process.kill()
            for spark in sparks:
                assert eventually(lambda spark=spark: spark.connected() == left, 20)
            macs.append(Mac(macs_hosts[0], tiny_llama_path, tmp_path / "again"))
            # Another receiver at that machine, with other keys: nobody is paired with it.
            assert eventually(lambda: bool(macs[2].code()), 60, 0.2), macs[2].server.tail()
            assert not any(eventually(lambda s=s: s.connected() != left, 3) for s in sparks)
        finally:
            for spark in sparks:
                spark.host.run(spark.fleet.close)
            for mac in macs:
                mac.server.stop()
