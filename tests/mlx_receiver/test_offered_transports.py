"""A receiver that offers several data transports at once."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from mlx_receiver import plugins
from mlx_receiver.receiver import Receiver
from mlx_receiver.settings import Settings, SettingsError
from mlx_receiver.transports.transport import Sender
from mlx_receiver.wire.messages import Welcome
from mlx_receiver.wire.sampling import Sampling
from tests.mlx_receiver.client import HERE, FakeVllm, started
from tests.mlx_receiver.conftest import Prefill

OFFERED = [name for name in ("zmq", "tcp", "nixl") if name in plugins.transports()]


class OverTransport(FakeVllm):
    """A client that sends its blocks through the named transport."""

    name = ""

    def connect_data(self) -> Sender:
        (endpoint,) = (e for e in self.receiver.data_endpoints if e.transport == self.name)
        endpoint = msgspec.structs.replace(endpoint, host=endpoint.host or "127.0.0.1")
        assert self.ticket is not None
        return plugins.transport(self.name).connect(endpoint, self.ticket, 5.0)


@pytest.fixture(scope="module")
def offering(tiny_llama_path: Path) -> Iterator[Receiver]:
    """A receiver with every installed transport."""
    with started(tiny_llama_path, kv_memory=1 << 30, transport=", ".join(OFFERED)) as receiver:
        yield receiver


@pytest.mark.parametrize("name", OFFERED)
def test_each_offered_transport_feeds_the_same_text(
    offering: Receiver, prefill: Prefill, name: str
) -> None:
    client = OverTransport(offering)
    client.name = name
    try:
        welcome = client.hello()
        assert isinstance(welcome, Welcome)
        assert [endpoint.transport for endpoint in welcome.endpoints] == OFFERED
        assert len({endpoint.port for endpoint in welcome.endpoints}) == len(OFFERED)
        kv = prefill(70)
        sampling = Sampling(max_tokens=8, temperature=0.0)
        session = client.request(kv, sampling, random.Random(name))
        assert [kv.first, *client.tokens(session)] == kv.tokens
    finally:
        client.close()


def test_an_unknown_transport_names_those_that_exist(tiny_llama_path: Path) -> None:
    settings = Settings(
        model=str(tiny_llama_path), **HERE, port=0, http_port=None, transport="tcp,pigeon"
    )
    receiver = Receiver(settings)
    try:
        with pytest.raises(SettingsError, match=r"'pigeon'.*tcp"):
            receiver.start()
    finally:
        receiver.stop()


@pytest.mark.parametrize("module", ["import no_such_module", "import sys; sys.exit('no licence')"])
def test_a_package_that_calls_its_own_as_ours_takes_nothing_away(
    module: str, tmp_path: Path
) -> None:
    (tmp_path / "another.py").write_text(module)
    metadata = tmp_path / "another-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: another\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[mac_decode]\ntcp = another\nmlx = another\n")
    program = "from mlx_receiver import plugins; print(*sorted(plugins.transports()))"
    path = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert done.stdout.split() == ["nixl", "tcp", "zmq"]
    assert "the plugin tcp (another) cannot be loaded and is left out" in done.stderr
