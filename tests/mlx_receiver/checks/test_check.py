"""``mlx-receiver check``: what each check says when all is well, and that it notices when not."""

from __future__ import annotations

import json
import resource
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from mlx_receiver import __version__
from mlx_receiver.caches.plain import PlainKV
from mlx_receiver.checks import decoding, machine, report, transfer
from mlx_receiver.checks.child import Begin, Facts, Found
from mlx_receiver.checks.finding import Finding
from mlx_receiver.checks.report import Report
from mlx_receiver.checks.users_model import check_fit
from mlx_receiver.decode.engine import DecodeEngine
from mlx_receiver.decode.model import find_model, load_model
from mlx_receiver.decode.weights import Memory
from mlx_receiver.interfaces import Interface
from mlx_receiver.transports.tcp import TcpTransport
from mlx_receiver.transports.transport import TransportError
from mlx_receiver.wire.frames import Header

WIRED = Interface("en0", "wired", ("10.0.0.2",), 10_000, "Ethernet")
SLOW = Interface("en5", "wired", ("10.0.0.3",), 1000, "USB LAN")
RADIO = Interface("en1", "wifi", ("192.168.1.7",))
TUNNEL = Interface("utun0", "virtual", ("100.64.0.9",))


def says(value: str | None) -> Callable[..., str | None]:
    return lambda *command: value


# --- the system -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("system", "processor", "translated", "state", "seen"),
    [
        ("darwin", "arm64", "0\n", "fine", "Apple silicon"),
        ("darwin", "x86_64", "1\n", "wrong", "Rosetta"),
        ("darwin", "x86_64", None, "wrong", "x86_64"),
        ("linux", "aarch64", None, "unchecked", "no Mac"),
    ],
)
def test_architecture(
    system: str, processor: str, translated: str | None, state: str, seen: str
) -> None:
    found = machine.check_architecture(system, processor, says(translated))
    assert (found.state, seen in found.seen) == (state, True)
    assert bool(found.remedy) == (state == "wrong")


@pytest.mark.parametrize(
    ("version", "state"), [("14.0", "fine"), ("26.1", "fine"), ("13.6.1", "wrong"), ("", "wrong")]
)
def test_macos(version: str, state: str) -> None:
    assert machine.check_macos(version).state == state


def test_python() -> None:
    assert machine.check_python((3, 14, 0)).state == "fine"
    found = machine.check_python((3, 9, 6))
    assert (found.state, found.seen) == ("wrong", "3.9.6 is too old")


@pytest.mark.parametrize(
    ("mlx", "lm", "metal", "state"),
    [
        ("0.32.4", "0.32.2", "0.32.4", "fine"),
        ("0.31.2", "0.32.2", "0.31.2", "wrong"),
        ("0.32.4", "0.31.3", "0.32.4", "wrong"),
        ("0.32.4", None, "0.32.4", "wrong"),
        ("0.32.4", "0.32.2", "0.32.1", "wrong"),
        ("0.32.4", "0.32.2", None, "wrong"),
        ("0.40.0", "0.32.2", "0.40.0", "warning"),
    ],
)
def test_packages(mlx: str, lm: str | None, metal: str | None, state: str) -> None:
    installed = {"mlx": mlx, "mlx-lm": lm, "mlx-metal": metal}
    found = machine.check_packages(installed.get, darwin=True)
    assert found.state == state
    assert f"mlx {mlx}" in found.seen
    assert ("pip install" in found.remedy) == (state != "fine")


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = machine.check_port("--port", port)
        assert (found.name, found.state) == ("port", "wrong")
        assert f"{port} cannot be used (Address already in use" in found.seen
        assert f"lsof -nP -iTCP:{port}" in found.remedy
    assert machine.check_port("--port", port).state == "fine"
    assert machine.check_port("--data-port", 0).seen == "any free one"


def test_open_files() -> None:
    assert machine.check_files(256, resource.RLIM_INFINITY).state == "fine"
    assert machine.check_files(256, 10_240).state == "fine"
    assert machine.check_files(256, 256).state == "warning"


@pytest.mark.parametrize(
    ("output", "state"),
    [
        ("Firewall is disabled. (State = 0)\n", "fine"),
        ("Firewall is enabled. (State = 1)\n", "warning"),
        ("Firewall is blocking all non-essential incoming connections. (State = 2)\n", "wrong"),
        ("usage: socketfilterfw", "unchecked"),
        (None, "unchecked"),
    ],
)
def test_firewall(output: str | None, state: str) -> None:
    found = machine.check_firewall(output, "/opt/python")
    assert found.state == state
    assert bool(found.remedy) == (state in ("warning", "wrong"))


PMSET = """\
System-wide power settings:
Currently in use:
 standby              1
 hibernatefile        /var/vm/sleepimage
 powernap             1
 disksleep            10
 sleep                {sleep}
 displaysleep         10
 tcpkeepalive         1
 lowpowermode         {low}
 womp                 1
"""


@pytest.mark.parametrize(
    ("sleep", "low", "state", "seen"),
    [
        ("0", 0, "fine", "never when idle"),
        ("1 (sleep prevented by sharingd)", 0, "fine", "after 1 idle minutes"),
        ("10", 1, "warning", "low power mode"),
    ],
)
def test_sleep(sleep: str, low: int, state: str, seen: str) -> None:
    found = machine.check_sleep(PMSET.format(sleep=sleep, low=low))
    assert (found.state, seen in found.seen) == (state, True)
    assert machine.check_sleep(None).state == "unchecked"


@pytest.mark.parametrize(
    ("found", "state", "seen"),
    [
        ([WIRED, RADIO, TUNNEL], "fine", "10.0.0.2 (en0, 10 Gbit/s); 192.168.1.7 (en1, Wi-Fi)"),
        ([SLOW, RADIO], "warning", "en5 is a bottleneck"),
        ([RADIO], "warning", "only Wi-Fi"),
        ([TUNNEL], "warning", "none of them is hardware"),
        ([], "wrong", "none is up"),
    ],
)
def test_interfaces(found: list[Interface], state: str, seen: str) -> None:
    said = machine.check_interfaces(found)
    assert (said.state, seen in said.seen) == (state, True), said


# --- MLX ------------------------------------------------------------------------------------------


def test_a_mac_without_metal_is_wrong_and_another_machine_is_not_checked() -> None:
    assert decoding.check_device("darwin").state == "wrong"
    found = decoding.check_device("linux")
    assert (found.state, "not checked: no Metal here" in found.seen) == ("unchecked", True)


def test_memory_of_one_thread_is_decoded_from_in_another() -> None:
    assert decoding.check_threads().state == "fine"


class Spoiling(PlainKV):
    """An adapter whose caches are not what was received."""

    def __init__(self, spoil: Callable[[Any], Any]) -> None:
        self._spoil = spoil
        self._layers = 0

    def allocate(self, *arguments: Any) -> Any:
        buffers = super().allocate(*arguments)
        build, spoil = buffers.build, self._spoil
        self._layers += 1
        if self._layers != 2:
            return buffers

        def spoiled(dtype: Any) -> Any:
            cache, arrays = build(dtype)
            cache.keys = spoil(cache.keys)
            return cache, [cache.keys, *arrays]

        buffers.build = spoiled  # type: ignore[method-assign]
        return buffers


def test_bytes_that_differ_are_noticed() -> None:
    found = decoding.check_threads(Spoiling(lambda keys: keys.at[0, 1, 7, 3].add(1)))
    assert (found.state, found.seen[:21]) == ("wrong", "1 of 307200 values di")


def test_a_hidden_copy_is_noticed() -> None:
    kept = []

    def copy(keys: Any) -> Any:
        kept.append(keys)  # else MLX writes the product where the factor was
        return keys * 1

    found = decoding.check_threads(Spoiling(copy))
    assert (found.state, "copies 1 of 4 arrays" in found.seen) == ("warning", True)


def test_an_alias_that_outlives_the_handoff_is_noticed() -> None:
    """Then MLX copies at the first decode step."""
    import mlx.core as mx

    kept = []

    def keep(keys: Any) -> Any:
        kept.append(np.array(keys.view(mx.uint16), copy=False))
        return keys

    found = decoding.check_threads(Spoiling(keep))
    assert (found.state, "when the cache is decoded from" in found.seen) == ("warning", True)


def test_a_thread_that_fails_is_noticed() -> None:
    found = decoding.check_threads(Spoiling(lambda keys: 1 / 0))
    assert (found.state, "division by zero" in found.seen) == ("wrong", True)


def test_tokens_of_both_processors() -> None:
    logits = np.random.default_rng(0).standard_normal((5, 50)).astype(np.float32)
    tokens = logits.argmax(-1).tolist()
    assert decoding.compare("tokens", tokens, logits).state == "fine"
    # A tie within rounding.
    near = logits.copy()
    other = (tokens[2] + 1) % 50
    near[2, other] = near[2, tokens[2]] + 1e-3
    found = decoding.compare("tokens", tokens, near)
    assert (found.state, "4 of 5" in found.seen, "within rounding" in found.seen) == (
        "fine", True, True,
    )  # fmt: skip
    near[2, other] += 2
    found = decoding.compare("tokens", tokens, near)
    assert (found.state, "at token 2" in found.seen) == ("wrong", True)
    near[4, 0] = np.nan
    assert decoding.compare("tokens", tokens, near).state == "wrong"


@pytest.fixture
def model(tiny_llama_path: Path) -> Any:
    return load_model(find_model(str(tiny_llama_path))).model


def test_the_reference_follows_the_text_that_the_gpu_wrote(model: Any) -> None:
    """One other token early on must not make all that follow it different."""
    import mlx.core as mx

    prompt = [30, 40, 50]
    tokens, logits = decoding.greedy(model, prompt, 6, mx.cpu)
    assert len(set(tokens)) > 2
    again, same = decoding.greedy(model, prompt, 6, mx.cpu, forced=tokens)
    assert again == tokens and np.array_equal(logits, same)
    forced = [tokens[0] + 1, *tokens[1:]]
    _, other = decoding.greedy(model, prompt, 6, mx.cpu, forced=forced)
    assert np.array_equal(other[0], logits[0]) and not np.allclose(other[1], logits[1])
    assert decoding.compare("t", forced, other).state == "wrong"


def test_logits_that_are_not_finite_are_noticed(model: Any) -> None:
    assert decoding.check_tokens("tokens", model, [30, 40], 2).state == "unchecked"
    model.lm_head.weight[5] = float("nan")
    found = decoding.check_tokens("tokens", model, [30, 40], 2)
    assert (found.state, found.seen) == ("wrong", "logits that are not finite")


def test_recovery(tiny_llama_path: Path) -> None:
    import mlx.core as mx

    source = find_model(str(tiny_llama_path))
    found = decoding.check_recovery(source, decoding.provoke_error)
    assert found.state == "fine" and "a cache of another shape" in found.seen
    assert decoding.check_recovery(source, lambda engine: "").state == "wrong"

    def other_tokens(engine: DecodeEngine) -> str:
        assert engine.loaded is not None
        head = engine.loaded.model.lm_head
        head.weight = -head.weight
        mx.eval(head.weight)
        return "something"

    found = decoding.check_recovery(source, other_tokens)
    assert (found.state, "other tokens" in found.seen) == ("wrong", True)

    def end(engine: DecodeEngine) -> str:
        engine.stop()
        return "something"

    found = decoding.check_recovery(source, end)
    assert (found.state, "nothing is decoded" in found.seen) == ("wrong", True)


# --- the transfer ---------------------------------------------------------------------------------


class Misbehaving(TcpTransport):
    """Sends other than what it is given."""

    def __init__(self, change: Callable[[Header, Any], tuple[Header, Any] | None]) -> None:
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


# --- the user's model -----------------------------------------------------------------------------


def test_what_fits_beside_a_model(tiny_llama_path: Path, tmp_path: Path) -> None:
    source = find_model(str(tiny_llama_path))
    found = check_fit(source, Memory(1 << 30, 2 << 30, metal=True))
    assert found.state == "fine"
    # 4 layers, 2 KV heads of 32, K and V, 2 bytes.
    assert "1 KiB of KV a token" in found.seen
    assert "weights of 0.02 GiB of the 1.0 GiB" in found.seen
    room = int(((1 << 30) - load_model(source).nbytes) * 0.4) // 1024
    assert f"room for {room:,} tokens, or {room // 8192} sessions" in found.seen
    found = check_fit(source, Memory(20 << 20, 64 << 30, metal=True))
    assert (found.state, "does not fit" in found.seen) == ("wrong", True)
    assert "iogpu.wired_limit_mb" in found.remedy
    (tmp_path / "config.json").write_bytes((tiny_llama_path / "config.json").read_bytes())
    assert check_fit(find_model(str(tmp_path))).state == "unchecked"


# --- the whole ------------------------------------------------------------------------------------


def child(*lines: Any, then: str = "") -> tuple[str, ...]:
    """A child that says those lines and then does something."""
    text = b"".join(msgspec.json.encode(line) + b"\n" for line in lines)
    code = f"import os, sys\nsys.stdout.buffer.write({text!r})\nsys.stdout.flush()\n{then}"
    return (sys.executable, "-c", code)


def test_a_child_that_aborts_is_a_finding() -> None:
    fine = Finding("Metal", "fine", "yes")
    told = child(Found(fine), Begin("tokens"), then="os.abort()")
    made = Report(child=told)
    assert [*made._in_child()] == [
        fine,
        Finding("tokens", "wrong", "it ended the process with SIGABRT", report._REPORT_IT),
    ]
    made = Report(child=child(Begin("tokens"), then="sys.exit(3)"))
    (found,) = made._in_child()
    assert (found.name, found.seen) == ("tokens", "the process ended with status 3")


def test_a_child_that_hangs_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_SECONDS", (0.5, 0.5))
    told = child(Begin("tokens"), then="import time; time.sleep(60)")
    (found,) = Report(child=told)._in_child()
    assert (found.name, found.state, found.seen) == ("tokens", "wrong", "still not done after 0 s")


def test_the_commands_for_both_sides() -> None:
    made = Report(model="mlx-community/M-4bit", port=7000, child=child(Facts("org/M")))
    for _ in made.findings():
        pass
    made._found = [WIRED, RADIO]
    assert made.ready
    assert made.commands("T", "K") == (
        "mlx-receiver start --model mlx-community/M-4bit --host 0.0.0.0 --token T --api-key K "
        "--port 7000",
        "MAC_DECODE_TOKEN=T MAC_DECODE_RECEIVER=10.0.0.2:7000 mac-decode check --model org/M",
        "MAC_DECODE_TOKEN=T MAC_DECODE_RECEIVER=10.0.0.2:7000 "
        "vllm serve org/M --kv-connector mac_decode",
    )
    # A fresh secret each time, and none in what may be published.
    here, check, _ = made.commands()
    token = here.split("--token ")[1].split()[0]
    assert len(token) == 32 and f"MAC_DECODE_TOKEN={token} " in check
    assert token not in made.commands()[0]
    assert "--token TOKEN --api-key KEY" in json.loads(made.json())["here"]


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mlx_receiver", "check", *options],
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip


@pytest.mark.server
def test_the_command_with_a_model(tiny_llama_path: Path) -> None:
    done = run("--model", str(tiny_llama_path), "--port", "0", "--http-port", "-1", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout)
    assert (said["version"], said["ready"]) == (__version__, True)
    states = {finding["name"]: finding["state"] for finding in said["findings"]}
    assert states["threads"] == states["recovery"] == states["model"] == "fine"
    # Nothing is claimed of a Mac that this is not.
    for name in ("architecture", "macOS", "Metal", "tokens", "model's tokens", "firewall", "sleep"):
        assert states[name] == "unchecked"
    assert states["loopback"] in ("fine", "warning")


@pytest.mark.server
def test_the_command_says_what_is_wrong_and_ends_with_1() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run("--model", "/no/such/folder", "--port", port)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"✗ port: {port} cannot be used" in done.stdout
    assert "✗ model: there is no folder /no/such/folder" in done.stdout
    assert done.stdout.splitlines()[-1] == "Not ready: port, model"
    # No log of ours between the lines of the report.
    assert "mlx_receiver" not in done.stderr and "connection" not in done.stderr


def test_options_that_cannot_be_used_end_it_with_2() -> None:
    for options in (["--port", "99999"], ["--nonsense"]):
        assert run(*options).returncode == 2
