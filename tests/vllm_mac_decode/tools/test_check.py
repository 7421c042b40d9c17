"""Each check made to fail, and what it then says to do."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from mlx_receiver.control.guard import Guard
from mlx_receiver.wire import keys
from mlx_receiver.wire import messages as m
from mlx_receiver.wire.addresses import Address, resolve
from mlx_receiver.wire.handshake import Introduction
from tests.conftest import free_port
from vllm_mac_decode.settings import Settings
from vllm_mac_decode.tools.check import Report, engine, receiver, run_checks, software, transfer
from vllm_mac_decode.tools.check.engine import EngineFacts
from vllm_mac_decode.tools.check.finding import Finding
from vllm_mac_decode.tools.check.receiver import ReceiverChecks, check_model, read_model

pytest.importorskip("mlx.core")

from mlx_receiver.receiver import Receiver
from mlx_receiver.settings import Settings as ReceiverSettings


@pytest.fixture(scope="module")
def real(tiny_llama_path: Path) -> Iterator[Receiver]:
    settings = ReceiverSettings(
        model=str(tiny_llama_path), port=0, http_port=0, kv_memory=1 << 28, token="secret"
    )
    with Receiver(settings) as started:
        yield started


class FakeReceiver:
    """A peer with the right keys that answers every message with the same one, or never."""

    def __init__(self, answer: bytes = b"") -> None:
        self.answer = answer
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._guard = Guard(self._router, "secret")
        self.port = self._router.bind_to_random_port("tcp://127.0.0.1")
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._ending.is_set():
            if self._router.poll(50):
                identity, _ = self._router.recv_multipart()
                if self.answer:
                    self._router.send_multipart([identity, self.answer])

    def close(self) -> None:
        self._ending.set()
        self._thread.join()
        self._guard.close()
        self._context.destroy(linger=0)


@pytest.fixture
def fake() -> Iterator[FakeReceiver]:
    started = FakeReceiver()
    yield started
    started.close()


def ask(port: int, model: Path | None = None, token: str = "secret") -> list[Finding]:
    settings = Settings(receiver=f"127.0.0.1:{port}", token=token)
    known = read_model(str(model)) if model is not None else None
    return list(ReceiverChecks(settings, known).findings())


def only(findings: list[Finding], state: str) -> Finding:
    """The one finding of that state."""
    (found,) = [finding for finding in findings if finding.state == state]
    return found


def welcome(tiny: Path, **changes: Any) -> bytes:
    values: dict[str, Any] = {
        "receiver": "r",
        "model": "tiny",
        "engine": "mlx 1",
        "endpoints": [m.Endpoint("tcp", "", free_port())],
        "ticket": keys.new_ticket(),
        "max_tokens": 8192,
        "codecs": ["raw"],
    }
    return m.encode(m.Welcome(**values | changes))


# --- the receiver -------------------------------------------------------------------------------


def test_a_receiver_that_is_ready_is_timed_into_its_memory(
    real: Receiver, tiny_llama_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiver, "SLOW", 0.0)
    before = real.metrics.kv_bytes._value.get()
    findings = ask(real.port, tiny_llama_path)
    assert {finding.state for finding in findings} == {"fine"}
    assert [f.name for f in findings] == ["address", "token", "model", "data path"]
    sent = findings[-1].figures["bytes"]
    assert isinstance(sent, int)
    # As many bytes as were asked for, in sessions of the model's context.
    assert 0.9 * transfer.TRANSFER_BYTES < sent <= transfer.TRANSFER_BYTES
    assert real.metrics.kv_bytes._value.get() - before == sent
    assert "GB/s" in findings[-1].seen
    assert f"mlx {metadata.version('mlx')}" in findings[2].seen


def test_a_slow_way_says_how_long_a_prompt_takes(
    real: Receiver, tiny_llama_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiver, "SLOW", float("inf"))
    slow = only(ask(real.port, tiny_llama_path), "warning")
    assert slow.name == "data path"
    assert "the KV of 8,192 tokens takes" in slow.remedy


def test_without_a_model_the_token_is_tested_all_the_same(real: Receiver) -> None:
    findings = ask(real.port)
    assert [f.state for f in findings] == ["fine", "fine", "warning"]
    assert real.source.name in findings[-1].seen
    assert "--model" in findings[-1].remedy


@pytest.mark.parametrize(("token", "seen"), [("guess", "The token is wrong"), ("", "No token was")])
def test_a_wrong_token_is_told_from_nobody_there(real: Receiver, token: str, seen: str) -> None:
    findings = ask(real.port, token=token)
    assert only(findings, "fine").name == "address"
    assert only(findings, "wrong").seen.startswith(seen)
    assert "MAC_DECODE_TOKEN" in only(findings, "wrong").remedy
    assert "guess" not in repr(findings)


def test_nobody_there() -> None:
    findings = ask(free_port())
    assert "Connection refused" in only(findings, "warning").seen
    assert "mlx-receiver start" in only(findings, "wrong").remedy


def test_a_name_without_an_address() -> None:
    (finding,) = ReceiverChecks(Settings(receiver="no-such-host.invalid"), None).findings()
    assert finding.state == "wrong"
    assert "no-such-host.invalid has no address" in finding.seen


def test_the_http_port_is_no_control_port(real: Receiver) -> None:
    assert real.http is not None
    findings = ask(real.http.port)
    assert "no receiver's control port" in only(findings, "warning").seen
    assert only(findings, "wrong").name == "reachable"


def test_each_address_of_a_name_is_tried(real: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    (alive,) = resolve("127.0.0.1", real.port)
    (dead,) = resolve("127.0.0.1", free_port())
    monkeypatch.setattr(receiver, "resolve", lambda host, port: [dead, alive])
    findings = ask(real.port)
    assert [f.state for f in findings] == ["warning", "fine", "fine", "warning"]
    assert dead.text in findings[0].seen
    assert alive.text in findings[1].seen


def test_a_peer_of_the_first_protocol_is_not_accepted() -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        port = router.bind_to_random_port("tcp://127.0.0.1")
        finding = only(ask(port), "wrong")
    assert "another version of the protocol" in finding.seen


def test_another_model_is_named_field_by_field(real: Receiver, tiny_qwen3_path: Path) -> None:
    finding = only(ask(real.port, tiny_qwen3_path), "wrong")
    assert "layers: 4 here, 3 there" in finding.seen
    assert finding.remedy == "Start both sides with the same model"


def test_a_receiver_that_still_loads(fake: FakeReceiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_mac_decode.tools.check.conversation.ANSWER_SECONDS", 0.3)
    finding = only(ask(fake.port), "wrong")
    assert "still loading" in finding.seen


@pytest.mark.parametrize(
    ("answer", "seen"),
    [
        (m.encode(m.Rejected(m.E_VERSION, "speak 3")), "refuses: speak 3"),
        (m.encode(m.Complete(1, 1)), "answers a greeting with Complete"),
        (b"HTTP/1.1", "not a message of protocol"),
    ],
)
def test_answers_of_another_version(fake: FakeReceiver, answer: bytes, seen: str) -> None:
    fake.answer = answer
    finding = only(ask(fake.port), "wrong")
    assert seen in finding.seen
    assert finding.remedy == "Install the same vllm-mac-decode on both machines"


def test_another_transport(fake: FakeReceiver, tiny_llama_path: Path) -> None:
    fake.answer = welcome(tiny_llama_path, endpoints=[m.Endpoint("zmq", "", 1)])
    finding = only(ask(fake.port, tiny_llama_path), "wrong")
    assert "no transport tcp, only zmq" in finding.seen
    assert finding.remedy == "export MAC_DECODE_TRANSPORT=zmq"


def test_a_data_port_behind_a_firewall(fake: FakeReceiver, tiny_llama_path: Path) -> None:
    port = free_port()
    fake.answer = welcome(tiny_llama_path, endpoints=[m.Endpoint("tcp", "", port)])
    finding = only(ask(fake.port, tiny_llama_path), "wrong")
    assert "The data path does not open: cannot reach 127.0.0.1" in finding.seen
    assert f"{port} (tcp)" in finding.remedy


def test_a_receiver_without_memory_is_not_timed(tiny_llama_path: Path) -> None:
    settings = ReceiverSettings(
        model=str(tiny_llama_path), port=0, http_port=None, kv_memory=1 << 20, token="secret"
    )
    with Receiver(settings) as small:
        finding = only(ask(small.port, tiny_llama_path), "warning")
    assert "opens, but was not timed: the receiver refuses" in finding.seen


def test_the_faster_of_two_addresses_is_recommended() -> None:
    slow, fast = (Address(socket.AF_INET, (host, 7790)) for host in ("192.168.1.7", "169.254.3.4"))
    checks = ReceiverChecks(Settings(receiver="mac-studio.local"), None)
    assert checks.best == "mac-studio.local:7790"
    timed = {slow: transfer.Transfer(1 << 28, 8.0), fast: transfer.Transfer(1 << 28, 0.25)}
    (finding,) = checks._judge(slow, timed)
    assert "mac-studio.local leads to 192.168.1.7:7790 first" in finding.seen
    assert finding.remedy.endswith("--mac-decode-receiver 169.254.3.4:7790")
    assert checks.best == "169.254.3.4:7790"
    assert list(ReceiverChecks(Settings(), None)._judge(fast, timed)) == []


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"speed": "10000\n"}, "en7, 10 Gbit/s"),
        ({"speed": "1000\n"}, "en7, 1 Gbit/s"),
        ({"wireless/x": ""}, "en7, Wi-Fi"),
        ({"speed": "-1\n"}, "en7"),
    ],
)
def test_interfaces_are_named_with_their_speed(
    tmp_path: Path, files: dict[str, str], text: str
) -> None:
    for name, content in files.items():
        file = tmp_path / "en7" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    assert transfer.read_interface("en7", tmp_path).text == text


def test_the_interface_of_an_address_is_found() -> None:
    (address,) = resolve("127.0.0.1", 1)
    assert transfer.interface_to(address).name == "lo"


# --- the model ----------------------------------------------------------------------------------


def test_a_model_that_cannot_be_handed_off(tiny_llama_path: Path) -> None:
    model = read_model(str(tiny_llama_path))
    assert check_model("m", model).state == "fine"

    def other(**fields: Any) -> Introduction:
        signature = msgspec.structs.replace(model.signature, **fields)
        return msgspec.structs.replace(model, signature=signature)

    assert "'gemma3' are not supported" in check_model("m", other(model_type="gemma3")).seen
    assert "sliding-window" in check_model("m", other(sliding_window=512)).seen


def test_nothing_is_tried_with_a_model_that_cannot_be_handed_off(
    tiny_llama_path: Path, tmp_path: Path
) -> None:
    config = json.loads((tiny_llama_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "gemma3"}))
    started: list[str] = []

    def start(model: str) -> EngineFacts:
        started.append(model)
        return EngineFacts(hooks=True)

    settings = Settings(receiver=f"127.0.0.1:{free_port()}")
    *_, report = run_checks(settings, str(tmp_path), start)
    assert isinstance(report, Report)
    assert not report.ready
    assert started == [""]


def test_a_model_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name, seen in (("/no/such/folder", "no such folder"), (str(tmp_path), "num_attention")):
        *_, report = run_checks(Settings(), name, lambda model: EngineFacts(hooks=True))
        assert isinstance(report, Report)
        assert not report.ready
        assert any(seen in f.seen and f.remedy == "Check --model" for f in report.findings)


# --- what is installed --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "state"),
    [
        ("0.25.1", "warning"),
        ("0.26.0", "fine"),
        ("0.33.2+cu130", "fine"),
        ("0.34.0rc1", "warning"),
        ("0.1.dev16260+g0123456", "warning"),
    ],
)
def test_a_version_alone_never_rules_a_vllm_out(
    version: str, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / f"vllm-{version}.dist-info"
    record.mkdir()
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)
    finding = software.check_vllm()
    assert (finding.state, version in finding.seen) == (state, True)
    assert "pip install" not in finding.remedy


def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    finding = software.check_vllm()
    assert finding.state == "wrong"
    assert "'vllm>=0.26,<0.34'" in finding.remedy


class Point:
    """An entry point that does not load."""

    def load(self) -> None:
        raise ImportError("half an installation")


@pytest.mark.parametrize(
    ("points", "seen"),
    [([], "is not registered"), ([Point()], "does not load: ImportError: half an installation")],
)
def test_a_plugin_that_is_not_there(
    points: list[Point], seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "entry_points", lambda **wanted: points)
    finding = software.check_plugin()
    assert finding.state == "wrong"
    assert seen in finding.seen
    # No index has a package of our name.
    assert "vllm-mac-decode @ git+" in finding.remedy


def test_a_plugin_that_vllm_may_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver")
    remedy = software.check_plugin().remedy
    assert "export VLLM_PLUGINS=lora_filesystem_resolver,mac_decode" in remedy
    monkeypatch.setenv("VLLM_PLUGINS", "mac_decode")
    assert software.check_plugin().state == "fine"


# --- the engine ---------------------------------------------------------------------------------

GIB = 1 << 30
SPARK = {"device": "NVIDIA GB10", "integrated": True, "total": 120 * GIB, "hooks": True}


def judged(**facts: Any) -> tuple[dict[str, Finding], float | None]:
    findings, utilization = engine.judge(EngineFacts(**SPARK | {"free": 115 * GIB} | facts), "m")
    return {finding.name: finding for finding in findings}, utilization


def test_a_memory_that_is_shared_gets_less() -> None:
    found, utilization = judged()
    assert (found["memory"].state, utilization) == ("fine", 0.85)
    assert "115 of 120 GiB, shared with the system" in found["memory"].seen
    assert judged(integrated=False)[1] is None


def test_a_memory_that_is_taken() -> None:
    found, utilization = judged(free=40 * GIB)
    assert (found["memory"].state, utilization) == ("warning", 0.3)
    assert "--gpu-memory-utilization 0.30" in found["memory"].remedy


def test_no_gpu() -> None:
    found, utilization = judged(total=0)
    assert (found["memory"].state, utilization) == ("warning", None)


def test_hooks_that_are_gone() -> None:
    found, _ = judged(hooks=False, error="AttributeError: no run_busy_loop")
    assert found["hooks"].state == "wrong"
    assert "no run_busy_loop" in found["hooks"].seen


def test_an_engine_that_does_not_start_is_no_fault_of_the_hand_off() -> None:
    found, _ = judged(error="ValueError: Free memory on device is less than desired")
    assert found["engine"].state == "warning"
    assert "less than desired" in found["engine"].seen


def test_a_cache_that_does_not_read_back() -> None:
    found, _ = judged(backend="FLASHINFER", problem="its dtype is torch.uint8")
    assert found["layout"].state == "wrong"
    assert "FLASHINFER cannot be exported: its dtype is torch.uint8" in found["layout"].seen
    assert judged(backend="FLASHINFER")[0]["layout"].state == "fine"


def test_a_vllm_without_the_hooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    facts = engine.ask_child("")
    assert not facts.hooks
    assert "No module named 'vllm.logger'" in facts.error


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("import os; print('last words'); os._exit(3)", "it ended with status 3: last words"),
        ("import time; time.sleep(60)", "it did not get ready within 2 s"),
    ],
)
def test_an_engine_that_takes_its_process_along(
    program: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert engine.ask_child("", 2.0 if "sleep" in program else 60.0).error == error


@pytest.mark.slow
@pytest.mark.server
def test_the_layout_of_the_backend_that_vllm_takes_here(
    tiny_llama_path: Path, tmp_path: Path
) -> None:
    pytest.importorskip("vllm")
    # No weights are needed.
    shutil.copytree(tiny_llama_path, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    facts = engine.ask_child(str(tmp_path / "m"))
    assert (facts.error, facts.problem, facts.hooks) == ("", "", True)
    # vLLM's "auto" takes a float32 model as bfloat16.
    assert (facts.backend, facts.kv_dtype, facts.early) == ("CPU_ATTN", "bfloat16", True)


# --- all of it ----------------------------------------------------------------------------------


def test_the_report_ends_with_the_command(real: Receiver, tiny_llama_path: Path) -> None:
    seen: list[str] = []

    def started(model: str) -> EngineFacts:
        seen.append(model)
        return EngineFacts(**SPARK, free=115 * GIB, backend="FLASH_ATTN", kv_dtype="bfloat16")

    settings = Settings(receiver=f"127.0.0.1:{real.port}", token="secret")
    *findings, report = run_checks(settings, str(tiny_llama_path), started)
    assert isinstance(report, Report)
    assert report.ready
    assert report.findings == findings
    assert seen == [str(tiny_llama_path)]
    assert report.command == (
        f"MAC_DECODE_TOKEN=... vllm serve {tiny_llama_path} --kv-connector mac_decode "
        f"--mac-decode-receiver 127.0.0.1:{real.port} --gpu-memory-utilization 0.85"
    )
    assert "secret" not in repr(report)


def test_no_command_where_it_would_not_work() -> None:
    settings = Settings(receiver=f"127.0.0.1:{free_port()}")
    *_, report = run_checks(settings, "", lambda model: EngineFacts(**SPARK))
    assert isinstance(report, Report)
    assert (report.ready, report.command) == (False, "")
