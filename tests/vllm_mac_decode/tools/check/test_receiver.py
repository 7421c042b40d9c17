"""Every way in which a receiver cannot be used, and what is then said."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import zmq

from mlx_receiver.control.credentials import SharedToken
from mlx_receiver.control.guard import Guard
from mlx_receiver.wire import codec, keys
from mlx_receiver.wire import messages as m
from mlx_receiver.wire.addresses import Address, resolve
from tests.conftest import free_port
from vllm_mac_decode.settings import Settings
from vllm_mac_decode.tools.check import receiver, transfer
from vllm_mac_decode.tools.check.finding import Finding
from vllm_mac_decode.tools.check.receiver import ReceiverChecks, read_model

pytest.importorskip("mlx.core")

from mlx_receiver.receiver import Receiver
from tests.mlx_receiver.client import started


class FakeReceiver:
    """A peer with the right keys that answers every message with the same one, or never."""

    def __init__(self, answer: bytes = b"") -> None:
        self.answer = answer
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._guard = Guard(self._router, SharedToken("secret"))
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
    return codec.encode(m.Welcome(**values | changes))


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
        (codec.encode(m.Rejected(m.E_VERSION, "speak 3")), "refuses: speak 3"),
        (codec.encode(m.Complete(1, 1)), "answers a greeting with Complete"),
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
    with started(tiny_llama_path, kv_memory=1 << 20, token="secret") as small:
        finding = only(ask(small.port, tiny_llama_path), "warning")
    assert "opens, but was not timed: the receiver refuses" in finding.seen


def test_the_faster_of_two_addresses_is_named() -> None:
    slow, fast = (Address(socket.AF_INET, (host, 7790)) for host in ("192.168.1.7", "169.254.3.4"))
    timed = {slow: transfer.Transfer(1 << 28, 8.0), fast: transfer.Transfer(1 << 28, 0.25, 9000)}
    finding = receiver._route(timed)
    assert finding.seen == (
        "KV will go to 169.254.3.4:7790 (1.07 GB/s, MTU 9000), not to 192.168.1.7:7790"
    )


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


def test_without_an_address_the_receiver_is_found(tiny_llama_path: Path) -> None:
    with started(tiny_llama_path, discovery=True) as announced:
        findings = list(ReceiverChecks(Settings(), None).findings())
    assert [f.name for f in findings] == ["discovery", "address", "token", "model"]
    assert f":{announced.port})" in findings[0].seen and findings[0].state == "fine"


def test_without_an_address_and_without_a_receiver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiver, "_LOOK_SECONDS", 0.3)
    monkeypatch.setattr("vllm_mac_decode.scheduler.candidates.DEFAULT_PORT", free_port())
    findings = list(ReceiverChecks(Settings(), None).findings())
    assert findings[0].name == "discovery" and findings[0].state == "warning"
    assert "no receiver is found on this network" in findings[0].seen
    assert findings[-1].name == "reachable" and findings[-1].state == "wrong"


def test_an_address_of_a_machine_that_is_not_paired(monkeypatch: pytest.MonkeyPatch) -> None:
    (finding,) = ReceiverChecks(Settings(receiver="192.0.2.77"), None).findings()
    assert (finding.name, finding.state) == ("pairing", "wrong")
    assert "mac-decode pair CODE --receiver 192.0.2.77" in finding.seen
