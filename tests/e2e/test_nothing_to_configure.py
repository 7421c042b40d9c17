"""Two machines that have never met: two commands and one code, and no address, token or model.

Two network namespaces are the machines, with two cables, multicast, and keys of their own.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

from mlx_receiver.pairing.keystore import STATE_VARIABLE
from tests.conftest import free_port
from tests.discovery.hosts import Host, two_hosts
from tests.servers import BIN, Receiver, Server, Vllm, start_vllm
from tests.waiting import eventually

pytestmark = pytest.mark.server

PROMPT = list(range(30, 130))
_T = TypeVar("_T")


@dataclass
class Machines:
    """A Spark, in whose namespace ``run`` calls, and a Mac; with a slow and a fast cable."""

    spark: Host
    mac: Host
    state: Path

    def run(self, call: Callable[..., _T], *args: object, **options: object) -> _T:
        return self.spark.pool.submit(call, *args, **options).result(300)

    def command(self, side: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A command of a user at that machine."""
        place = (self.mac if side == "mac" else self.spark).place
        program, *rest = arguments
        return subprocess.run(
            place.command([str(BIN / program), *rest]),
            capture_output=True, text=True, timeout=60, check=False,
            env=os.environ | {STATE_VARIABLE: str(self.state / side)},
        )  # fmt: skip


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    with two_hosts(cables=2) as (spark, mac):
        for cable, mbits in enumerate((100, 1000)):
            spark.shape(cable, mbits)
        yield Machines(spark, mac, tmp_path_factory.mktemp("state"))


def start_mac(machines: Machines, models: Path, log: Path, http_port: int) -> Receiver:
    command = machines.mac.place.command(
        [str(BIN / "mlx-receiver"), "start", "--models", str(models), "--dtype", "float32",
         "--http-port", str(http_port)]
    )  # fmt: skip
    state = {STATE_VARIABLE: str(machines.state / "mac")}
    return Receiver(Server(command, log, state), 7790, http_port)


def handed_off(vllm: Vllm) -> bool:
    """Whether the receiver decodes now."""
    before = vllm.metric("vllm:mac_decode_tokens_total")
    vllm.tokens([5, 6, 7], 3)
    return vllm.metric("vllm:mac_decode_tokens_total") > before


def test_two_commands_and_one_code(
    machines: Machines, tiny_llama_path: Path, tmp_path: Path
) -> None:
    log = tmp_path / "receiver.log"
    receiver = start_mac(machines, tiny_llama_path.parent, log, free_port())
    vllm: Vllm | None = None
    try:
        assert eventually(lambda: "mac-decode pair" in log.read_text(), 60, 0.2), log.read_text()
        said = log.read_text()
        found = re.search(r"mac-decode pair (\d{4}-\d{4})", said)
        assert found is not None
        assert "--receiver" not in said and "TOKEN" not in said
        vllm = machines.run(
            start_vllm,
            tiny_llama_path,
            tmp_path / "vllm.log",
            receiver="",
            env={STATE_VARIABLE: str(machines.state / "spark"), "MAC_DECODE_RECEIVER": ""},
        )
        # Not paired yet: everything is local, and the log says what to do.
        expected = machines.run(vllm.tokens, PROMPT, 12)
        assert eventually(lambda: "mac-decode pair CODE" in vllm.server.log.read_text(), 20, 0.2)
        paired = machines.command("spark", "mac-decode", "pair", found[1])
        assert paired.returncode == 0, paired.stderr
        # The receiver loads what vLLM serves, and is used.
        assert eventually(lambda: "Serving" in log.read_text(), 60, 0.2), log.read_text()
        assert machines.run(eventually, lambda: handed_off(vllm), 40, 0.3), vllm.server.tail()
        assert machines.run(vllm.tokens, PROMPT, 12) == expected
        assert machines.run(vllm.metric, "vllm:mac_decode_tokens_total") > 0
        # Over the faster cable, by one of its two addresses.
        fast = {machines.mac.address(1, 4), machines.mac.address(1, 6)}
        chosen = re.findall(r"KV goes to ([^ %]+)", vllm.server.log.read_text())
        assert chosen and set(chosen) <= fast
        # A pairing that is taken back ends it at once; nothing is lost.
        gone = machines.command("mac", "mlx-receiver", "unpair", "*")
        assert gone.returncode == 0 and "Forgot" in gone.stdout
        assert eventually(lambda: "not paired any more" in vllm.server.log.read_text(), 20, 0.2)
        assert machines.run(vllm.tokens, PROMPT, 12) == expected
        local = machines.run(vllm.metric, "vllm:mac_decode_local_total", reason="no_receiver")
        assert local > 0
    finally:
        if vllm is not None:
            vllm.server.stop()
        receiver.server.stop()
