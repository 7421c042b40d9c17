"""The first start: the model has to be fetched, and something is not as it should be."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import ifaddr
import pytest

from mlx_receiver import serve
from mlx_receiver.announcement import wifi_warning
from mlx_receiver.decode import hub as hub_client
from mlx_receiver.decode import weights
from mlx_receiver.decode.model import ModelError, find_model, load_model
from mlx_receiver.decode.weights import Memory, refusal, weights_nbytes
from mlx_receiver.interfaces import (
    Interface,
    _of_linux,
    check_host,
    interfaces,
    of_macos,
    ordered,
    reachable_at,
    usable,
)
from mlx_receiver.settings import SettingsError
from tests.conftest import free_port
from tests.mlx_receiver.hub import COMMIT, NAME, Hub, hub

START = (sys.executable, "-m", "mlx_receiver", "start")


class Started:
    """A receiver's process and what it has said."""

    def __init__(self, *options: str, env: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [*START, *options], stderr=subprocess.PIPE, text=True, env={**os.environ, **env}
        )
        self.said = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said += line

    def wait_for(self, text: str, seconds: float = 240.0) -> None:
        until = time.monotonic() + seconds
        while not re.search(text, self.said):
            assert time.monotonic() < until and self.process.poll() is None, self.said
            time.sleep(0.05)

    def end(self, number: int) -> tuple[int, float]:
        """The exit status after a signal, and how long it took."""
        began = time.monotonic()
        self.process.send_signal(number)
        status = self.process.wait(timeout=30)
        self._reader.join()
        return status, time.monotonic() - began


@contextmanager
def started(fetches_from: Hub, home: Path, *options: str) -> Iterator[Started]:
    env = fetches_from.environment(home)
    process = Started("--model", NAME, "--http-port", "-1", *options, env=env)
    try:
        yield process
    finally:
        process.process.kill()
        process.process.wait()


@pytest.mark.server
@pytest.mark.parametrize(
    ("number", "stalls"),
    [(signal.SIGINT, "/api/models"), (signal.SIGTERM, "model.safetensors")],
)
def test_a_signal_ends_it_while_the_hub_keeps_it_waiting(
    tiny_llama_path: Path, tmp_path: Path, number: signal.Signals, stalls: str
) -> None:
    with (
        hub(tiny_llama_path, stalls=stalls) as stalling,
        started(stalling, tmp_path, "--port", "0") as receiver,
    ):
        stalling.wait_for(stalls)
        status, seconds = receiver.end(number)
    assert status == 0
    assert seconds < 2
    assert receiver.said.endswith("Stopped.\n")


@pytest.mark.server
def test_ports_are_taken_before_the_weights_are_fetched(
    tiny_llama_path: Path, tmp_path: Path
) -> None:
    port, http_port = free_port(), free_port()
    options = ("--port", str(port), "--http-port", str(http_port))
    with (
        hub(tiny_llama_path, stalls="model.safetensors") as stalling,
        started(stalling, tmp_path, *options) as receiver,
    ):
        stalling.wait_for("GET /owner/model/resolve/" + COMMIT + "/model.safetensors")
        with pytest.raises(OSError, match="in use"), socket.create_server(("127.0.0.1", port)):
            pass
        answer = httpx.get(f"http://127.0.0.1:{http_port}/health", timeout=30)
        assert (answer.status_code, answer.json()["status"]) == (503, "loading")
        receiver.end(signal.SIGTERM)


@pytest.mark.server
def test_a_port_in_use_ends_it_before_anything_large_is_fetched(
    tiny_llama_path: Path, tmp_path: Path
) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        hub(tiny_llama_path) as giving,
        started(giving, tmp_path, "--port", str(taken.getsockname()[1])) as receiver,
    ):
        assert receiver.process.wait(timeout=240) == 2
    assert not any("model.safetensors" in path for path in giving.requests)


@pytest.mark.server
def test_what_is_printed_works_on_another_machine(tiny_llama_path: Path) -> None:
    """Its interfaces' addresses, never the one that means all of them, and no path of this one."""
    every = [(i.addresses[0], i) for i in interfaces() if ":" not in i.addresses[0]]
    options = ("--token", "secret", "--no-discovery")
    receiver = Started(
        "--model", str(tiny_llama_path), "--port", "0", "--http-port", "0", *options, env={}
    )
    try:
        receiver.wait_for(r"vllm serve MODEL --kv-connector mac_decode\n")
        receiver.wait_for(r"MODEL is what vLLM calls the model of ")
        assert receiver.end(signal.SIGTERM)[0] == 0
    finally:
        receiver.process.kill()
    assert "0.0.0.0" not in receiver.said and "secret" not in receiver.said
    best = every[0][0] if every else "127.0.0.1"
    assert re.search(rf"MAC_DECODE_TOKEN=\.\.\. MAC_DECODE_RECEIVER={best}:\d+ ", receiver.said)
    for address, interface in every:
        assert re.search(rf"Listening on {address}:\d+ \({interface.text}\)", receiver.said)


@pytest.mark.server
def test_a_model_of_the_hub_is_fetched_and_served_under_its_name(
    tiny_llama_path: Path, tmp_path: Path
) -> None:
    with (
        hub(tiny_llama_path) as giving,
        started(giving, tmp_path, "--port", "0") as receiver,
    ):
        receiver.wait_for(r"vllm serve owner/model --kv-connector mac_decode\n")
        assert receiver.end(signal.SIGINT)[0] == 0


@pytest.mark.parametrize(
    ("name", "copy"),
    [
        (NAME, "look for one at https://huggingface.co/mlx-community"),
        (
            "meta-llama/Llama-3.1-8B-Instruct",
            "--model mlx-community/Meta-Llama-3.1-8B-Instruct-4bit",
        ),
    ],
)
def test_a_gated_model_says_how_to_get_it(
    tiny_llama_path: Path, tmp_path: Path, name: str, copy: str
) -> None:
    with hub(tiny_llama_path, gated=True, name=name) as refusing:
        line = with_hub(refusing, tmp_path, f"hub.description({name!r})").stderr.splitlines()[-1]
    assert "hf auth login" in line
    assert f"accept it at https://huggingface.co/{name}" in line
    assert copy in line


def test_an_unknown_model_keeps_to_one_line(tiny_llama_path: Path, tmp_path: Path) -> None:
    with hub(tiny_llama_path) as giving:
        done = subprocess.run(
            [*START, "--model", "nobody/nothing"], capture_output=True, text=True, check=False,
            env={**os.environ, **giving.environment(tmp_path)}, timeout=240,
        )  # fmt: skip
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert "nobody/nothing is neither a folder here nor a model at" in line
    assert "hf auth login" in line


def test_the_download_shows_its_progress(tiny_llama_path: Path, tmp_path: Path) -> None:
    code = "hub.weights(hub.description('owner/model'), lambda *seen: print(*seen))"
    # Half a second is longer than the bars of the hub's library wait before they show more.
    with hub(tiny_llama_path, pause=0.5) as giving:
        done = with_hub(giving, tmp_path, code)
    size = (tiny_llama_path / "model.safetensors").stat().st_size
    counts = [int(line.split()[1]) for line in done.stdout.splitlines()]
    # With what describes the model, which is there already.
    assert counts[-1] >= size
    assert counts == sorted(counts) and len(set(counts)) > 2
    assert done.stderr == ""


def with_hub(server: Hub, home: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run code that calls ``mlx_receiver.decode.hub``, whose library reads its variables once."""
    return subprocess.run(
        [sys.executable, "-c", f"from mlx_receiver.decode import hub\n{code}"], capture_output=True,
        text=True, check=False, timeout=120, env={**os.environ, **server.environment(home)},
    )  # fmt: skip


def test_what_vllm_calls_the_model(tiny_llama_path: Path, tmp_path: Path) -> None:
    assert find_model(str(tiny_llama_path)).vllm_name is None
    snapshot = tmp_path / "models--Qwen--Qwen3-0.6B" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    config = json.loads((tiny_llama_path / "config.json").read_text())
    (snapshot / "config.json").write_text(json.dumps(config))
    assert find_model(str(snapshot)).vllm_name == "Qwen/Qwen3-0.6B"
    # Weights that MLX has quantised are nothing for vLLM.
    (snapshot / "config.json").write_text(json.dumps(config | {"quantization": {"bits": 4}}))
    assert find_model(str(snapshot)).vllm_name is None
    for said in ("base_model: Qwen/Qwen3-0.6B", "base_model:\n- Qwen/Qwen3-0.6B"):
        (snapshot / "README.md").write_text(f"---\nlicense: other\n{said}\ntags: [mlx]\n---\nText")
        assert find_model(str(snapshot)).vllm_name == "Qwen/Qwen3-0.6B"
    assert hub_client.name_of(tiny_llama_path) is None


def test_a_mac_is_kept_awake_while_the_process_lives(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert serve._keep_awake() is False  # no Mac
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr(serve, "_CAFFEINATE", str(tmp_path / "missing"))
    assert serve._keep_awake() is False
    script, heard = tmp_path / "caffeinate", tmp_path / "heard"
    script.write_text(f'#!/bin/sh\necho "$@" > {heard}.part; mv {heard}.part {heard}\n')
    script.chmod(0o755)
    monkeypatch.setattr(serve, "_CAFFEINATE", str(script))
    assert serve._keep_awake() is True
    until = time.monotonic() + 30
    while not heard.exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    assert heard.read_text() == f"-i -w {os.getpid()}\n"


def test_wifi_is_said_to_be_slow_in_numbers() -> None:
    said = wifi_warning(Interface("en1", "wifi", ("192.168.1.7",)), 131_072)  # an 8B model
    assert "en1 is Wi-Fi" in said
    assert "8,192 tokens (1.07 GB) takes some 11 to 43 s, 0.9 s on a 10 Gbit/s cable" in said


# --- memory -------------------------------------------------------------------------------------


def test_the_size_of_weights_is_known_before_they_are_loaded(
    tiny_llama_path: Path, tmp_path: Path
) -> None:
    source = find_model(str(tiny_llama_path))
    assert weights_nbytes(tiny_llama_path) == load_model(source).nbytes
    assert weights_nbytes(tiny_llama_path, "bfloat16") == load_model(source, "bfloat16").nbytes
    index = {"metadata": {"total_size": 123}, "weight_map": {"a": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weights_nbytes(tmp_path) == 123
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    assert weights_nbytes(tmp_path) is None
    (tmp_path / "model.safetensors").write_bytes(b"no safetensors")
    assert weights_nbytes(tmp_path) == 0


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(
    tiny_llama_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "memory", lambda: Memory(20 << 20, 32 << 30, metal=True))
    with pytest.raises(ModelError, match="does not fit: its weights take"):
        load_model(find_model(str(tiny_llama_path)))


def test_a_configuration_that_mlx_lm_cannot_read_is_refused_in_words(
    tiny_llama_path: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_llama_path, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "apertus"}))
    with pytest.raises(ModelError, match=r"loading .* failed: mlx-lm says .*missing .*'qk_norm'"):
        load_model(find_model(str(folder)))


def test_what_fits_is_said_and_how_the_gpu_may_use_more() -> None:
    gib = 1 << 30
    session = gib // 10
    mac = Memory(48 * gib, 64 * gib, metal=True)
    assert refusal("m", 40 * gib, session, mac) is None
    said = refusal("m", 48 * gib, session, mac) or ""
    assert "weights take 48.0 GiB" in said
    assert "its GPU may use 48.0 GiB" in said
    assert "below 47.8 GiB" in said and "4 bits" in said
    limit = re.search(r"sudo sysctl iogpu.wired_limit_mb=(\d+)", said)
    assert limit
    raised = Memory(int(limit[1]) << 20, 64 * gib, metal=True)
    assert refusal("m", 48 * gib, session, raised) is None
    # More than the machine has, or no Mac: only a smaller model helps.
    for other in (mac, Memory(48 * gib, 64 * gib, metal=False)):
        said = refusal("m", 63 * gib, session, other) or ""
        assert "4 bits" in said and "sysctl" not in said


# --- addresses ----------------------------------------------------------------------------------

IFCONFIG = """\
lo0: flags=8049<UP,LOOPBACK,RUNNING,MULTICAST> mtu 16384
\toptions=1203<RXCSUM,TXCSUM,TXSTATUS,SW_TIMESTAMP>
\tinet 127.0.0.1 netmask 0xff000000
\tinet6 ::1 prefixlen 128
\tinet6 fe80::1%lo0 prefixlen 64 scopeid 0x1
gif0: flags=8010<POINTOPOINT,MULTICAST> mtu 1280
en0: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500
\tether 64:76:ba:ae:a3:02
\tinet6 fe80::6676:baff:feae:a302%en0 prefixlen 64 secured scopeid 0x4
\tinet 10.0.0.2 netmask 0xffffff00 broadcast 10.0.0.255
\tnd6 options=201<PERFORMNUD,DAD>
\tmedia: autoselect (10Gbase-T <full-duplex,flow-control>)
\tstatus: active
en1: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500
\tether 64:76:ba:ae:a3:03
\tinet 192.168.1.7 netmask 0xffffff00 broadcast 192.168.1.255
\tinet6 2001:db8::7 prefixlen 64 autoconf secured
\tmedia: autoselect
\tstatus: active
en2: flags=8963<UP,BROADCAST,SMART,RUNNING,PROMISC,SIMPLEX,MULTICAST> mtu 1500
\tinet 192.168.7.7 netmask 0xffffff00 broadcast 192.168.7.255
\tmedia: autoselect <full-duplex>
\tstatus: inactive
en7: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500
\tinet 169.254.3.4 netmask 0xffff0000 broadcast 169.254.255.255
\tmedia: autoselect (2500Base-T <full-duplex>)
\tstatus: active
bridge0: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500
\tinet 169.254.9.9 netmask 0xffff0000 broadcast 169.254.255.255
\tmember: en2 flags=3<LEARNING,DISCOVER>
\tmedia: <unknown type>
\tstatus: active
utun0: flags=8051<UP,POINTOPOINT,RUNNING,MULTICAST> mtu 1380
\tinet 100.64.0.9 --> 100.64.0.9 netmask 0xffffffff
"""

HARDWARE_PORTS = """

Hardware Port: Ethernet
Device: en0
Ethernet Address: 64:76:ba:ae:a3:02

Hardware Port: Wi-Fi
Device: en1
Ethernet Address: 64:76:ba:ae:a3:03

Hardware Port: Thunderbolt 1
Device: en2
Ethernet Address: 36:a1:0b:22:33:40

Hardware Port: USB 10/100/1G/2.5G LAN
Device: en7
Ethernet Address: 00:e0:4c:68:01:02

Hardware Port: Thunderbolt Bridge
Device: bridge0
Ethernet Address: N/A

VLAN Configurations
===================
"""


def test_a_macs_interfaces_wired_and_fast_ones_first() -> None:
    found = ordered(of_macos(IFCONFIG, HARDWARE_PORTS))
    assert [(i.addresses, i.text) for i in found] == [
        (("10.0.0.2",), "en0, 10 Gbit/s"),
        (("169.254.3.4",), "en7, USB 10/100/1G/2.5G LAN, 2.5 Gbit/s"),
        (("169.254.9.9",), "bridge0, Thunderbolt Bridge"),
        (("192.168.1.7", "2001:db8::7"), "en1, Wi-Fi"),
        (("100.64.0.9",), "utun0, virtual"),
    ]


@pytest.mark.parametrize(
    ("media", "mbits"),
    [("100baseTX", 100), ("1000baseT", 1000), ("5000Base-T", 5000), ("2.5GbaseT", 2500),
     ("25GbaseT", 25_000), ("none", None)],
)  # fmt: skip
def test_speeds(media: str, mbits: int | None) -> None:
    text = f"en0: flags=8863<UP> mtu 1500\n\tinet 10.0.0.2\n\tmedia: autoselect ({media})"
    assert of_macos(text, "")[0].mbits == mbits


def test_a_linux_machines_interfaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An address that has a label is the interface's all the same; other versions come apart."""

    def adapter(name: str, *addresses: Any) -> ifaddr.Adapter:
        return ifaddr.Adapter(name, name, [ifaddr.IP(one, 24, name) for one in addresses])

    given = [
        adapter("lo", "127.0.0.1"),
        adapter("eth0", "10.0.0.1", ("2001:db8::1", 0, 0), ("fe80::1", 0, 2)),
        adapter("eth0:1", "10.0.0.9"),
        adapter("wlan0"),
    ]
    monkeypatch.setattr(ifaddr, "get_adapters", lambda include_unconfigured: given)
    (tmp_path / "eth0" / "device").mkdir(parents=True)
    (tmp_path / "eth0" / "speed").write_text("10000\n")
    (tmp_path / "wlan0" / "wireless").mkdir(parents=True)
    assert _of_linux(tmp_path) == [
        Interface("lo", "virtual", ()),
        Interface("eth0", "wired", ("10.0.0.1", "10.0.0.9", "2001:db8::1"), 10_000),
        Interface("wlan0", "wifi", ()),
    ]


def test_addresses_that_others_can_use() -> None:
    given = ["fe80::1%en0", "127.0.0.1", "2001:db8::1", "169.254.1.1", "10.0.0.1", "::1"]
    assert usable(given) == ("10.0.0.1", "169.254.1.1", "2001:db8::1")


def test_what_is_listened_on_is_named_as_others_call_it() -> None:
    wired = Interface("en0", "wired", ("10.0.0.2", "2001:db8::2"), 10_000)
    radio = Interface("en1", "wifi", ("192.168.1.7",))
    only6 = Interface("en2", "wired", ("2001:db8::9",))
    found = [wired, only6, radio]
    assert reachable_at("0.0.0.0", found) == [("10.0.0.2", wired), ("192.168.1.7", radio)]
    everything = [("10.0.0.2", wired), ("2001:db8::9", only6), ("192.168.1.7", radio)]
    assert reachable_at("::", found) == everything
    assert reachable_at("192.168.1.7", found) == [("192.168.1.7", radio)]
    assert reachable_at("[2001:db8::2]", found) == [("2001:db8::2", wired)]
    assert reachable_at("127.0.0.1", found) == [("127.0.0.1", None)]


@pytest.mark.parametrize("host", ["nonsense.invalid", "203.0.113.9", "fe80::1", "a b"])
def test_a_host_that_is_not_this_machine(host: str) -> None:
    with pytest.raises(SettingsError) as refused:
        check_host(host)
    assert f"--host {host} cannot be listened on (" in str(refused.value)
    assert "0.0.0.0 is every address" in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_hosts_that_are() -> None:
    for host in ("127.0.0.1", "0.0.0.0", "localhost", "::"):
        check_host(host)
