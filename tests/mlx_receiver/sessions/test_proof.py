"""The receiver compares a prompt's cache with its own, and remembers what that gave."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from mlx_receiver.decode import comparisons
from mlx_receiver.decode.jobs import Verdict
from mlx_receiver.decode.proof import bits
from mlx_receiver.receiver import Receiver
from mlx_receiver.sessions.proofs import Proofs, proof_prompt
from mlx_receiver.wire import fingerprint
from mlx_receiver.wire.handshake import Introduction
from mlx_receiver.wire.layout import CacheLayout, full_attention, windowed
from mlx_receiver.wire.messages import E_MODEL, Proven, Refused, Rejected, Welcome
from mlx_receiver.wire.ranges import MAX_PROOF_TOKENS
from mlx_receiver.wire.sampling import Sampling
from mlx_receiver.wire.signature import ModelSignature
from tests.mlx_receiver.client import FakeVllm, Prefilled, started
from tests.mlx_receiver.conftest import Prefill
from tests.waiting import eventually

ONE = Sampling(max_tokens=1)


@pytest.fixture(scope="module")
def live(tiny_llama_path: Path) -> Iterator[Receiver]:
    with started(tiny_llama_path, dtype="float32") as receiver:
        yield receiver


def proof(client: FakeVllm, kv: Prefilled) -> Proven:
    session = client.open(kv.prompt, ONE, {"proof": True})
    client.opened(session)
    client.send_kv(session, kv)
    client.start(session, kv.first)
    said: Proven = client.wait(lambda m: isinstance(m, Proven) and m.session == session)
    return said


def changed(kv: Prefilled, layer: int, part: int, change: Any) -> Prefilled:
    planes = [list(pair) for pair in kv.planes]
    numbers = planes[layer][part].view(np.float32).copy()
    planes[layer][part] = change(numbers).astype(np.float32).view(planes[layer][part].dtype)
    return Prefilled(kv.prompt, planes, kv.dtype, kv.tokens)


@pytest.mark.parametrize("tokens", [1, 33, 64])
def test_the_same_cache(live: Receiver, prefill: Prefill, tokens: int) -> None:
    client = FakeVllm(live)
    who = {"client": f"same-{tokens}"}
    welcome = client.hello(**who)
    assert isinstance(welcome, Welcome) and len(welcome.proof_token_ids) == 64
    said = proof(client, prefill(tokens))
    assert said.same and "4 layers compared, at most" in said.text
    client.close()
    again = FakeVllm(live)
    welcome = again.hello(**who)
    assert isinstance(welcome, Welcome) and welcome.proof_token_ids == []
    again.close()
    assert eventually(lambda: live.store.reserved_bytes == 0)


@pytest.mark.parametrize(
    ("layer", "part", "change", "names"),
    [
        (0, 0, lambda a: a * 1.01, "layer 0, keys: 1 % apart"),
        (2, 1, lambda a: -a, "layer 2, values: 200 % apart (cosine -1.000"),
        (3, 0, lambda a: a[::-1], "layer 3, keys: "),
        (1, 0, lambda a: a[:, ::-1], "layer 1, keys: "),
        (1, 1, lambda a: np.where(a == a.max(), np.nan, a), "layer 1, values: nan % apart"),
        (1, 1, lambda a: np.where(a == a.max(), np.inf, a), "layer 1, values: "),
        (2, 0, np.zeros_like, "layer 2, keys: 100 % apart (cosine 0.000"),
    ],
)
def test_a_cache_that_differs(
    live: Receiver, prefill: Prefill, layer: int, part: int, change: Any, names: str
) -> None:
    client = FakeVllm(live)
    who = {"client": f"differs-{layer}-{part}-{names}"}
    assert isinstance(client.hello(**who), Welcome)
    said = proof(client, changed(prefill(40), layer, part, change))
    assert not said.same and said.text.startswith(names), said.text
    assert "the first of the 1 of 8 parts" in said.text
    client.close()
    again = FakeVllm(live)
    refused = again.hello(**who)
    assert isinstance(refused, Rejected) and refused.code == E_MODEL
    assert refused.reason == said.text
    again.close()
    other = FakeVllm(live)
    assert isinstance(other.hello(client="somebody else"), Welcome)
    other.close()


def behind_another(client: FakeVllm, kv: Prefilled, tokens: int = 400) -> tuple[int, int]:
    """A session that is decoded for long, and a proof whose cache is there."""
    running = client.request(kv, Sampling(max_tokens=tokens, temperature=0.0))
    client.wait(lambda m: getattr(m, "session", 0) == running and hasattr(m, "token_ids"))
    session = client.open(kv.prompt, ONE, {"proof": True})
    client.opened(session)
    client.send_kv(session, kv)
    client.start(session, kv.first)
    client.complete(session)
    return running, session


def test_it_waits_until_nothing_is_decoded(live: Receiver, prefill: Prefill) -> None:
    client = FakeVllm(live)
    client.hello(client="waits")
    kv = prefill(33)
    running, _ = behind_another(client, kv)
    time.sleep(0.2)
    assert not any(isinstance(m, Proven) for m in client.inbox) and live.engine.decoding == 1
    client.cancel(running)
    assert client.wait(lambda m: isinstance(m, Proven)).same
    client.close()


def test_it_does_not_wait_for_ever(
    live: Receiver, prefill: Prefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another vLLM may always have something that is decoded."""
    monkeypatch.setattr(comparisons, "PATIENCE", 0.3)
    client = FakeVllm(live)
    client.hello(client="waits long enough")
    kv = prefill(33, decode=100)
    running, session = behind_another(client, kv, 7000)
    assert client.wait(lambda m: isinstance(m, Proven) and m.session == session).same
    assert live.engine.decoding == 1
    decoded: dict[int, list[int]] = {}
    for step in client.steps(running):
        decoded[step.position] = step.token_ids
        if step.position >= 99:
            break
    assert len(decoded) > 50 and all([kv.tokens[at]] == it for at, it in decoded.items())
    client.cancel(running)
    client.close()


def test_one_that_is_cancelled_leaves_nothing(live: Receiver, prefill: Prefill) -> None:
    client = FakeVllm(live)
    client.hello(client="cancels")
    kv = prefill(33)
    running, session = behind_another(client, kv)
    again = client.opened(client.open(kv.prompt, ONE, {"proof": True}))
    assert isinstance(again, Refused) and "one proof at a time" in again.reason
    held = live.store.reserved_bytes
    client.cancel(session)
    # Also while others are decoded, which may be always.
    assert eventually(lambda: live.store.reserved_bytes < held)
    assert live.engine.decoding == 1 and not live.engine._gap.proofs
    client.cancel(running)
    assert eventually(lambda: live.store.reserved_bytes == 0)
    assert proof(client, kv).same, "the engine still works"
    client.close()


@pytest.mark.parametrize("changes", [{"unclaimed": True}, {"prompt": MAX_PROOF_TOKENS + 1}])
def test_what_is_no_proof_is_refused(live: Receiver, changes: dict[str, Any]) -> None:
    client = FakeVllm(live)
    client.hello(client="refused")
    prompt = [1] * changes.pop("prompt", 8)
    answer = client.opened(client.open(prompt, ONE, {"proof": True, **changes}))
    assert isinstance(answer, Refused) and "a proof is" in answer.reason
    client.close()


def test_the_prompt_fills_short_windows_and_fits_the_context() -> None:
    plain = full_attention(2, 2, 8, "float32")
    assert len(proof_prompt(plain, 1000, 4096)) == 64
    short = CacheLayout([plain.layers[0], windowed(plain.layers[1], 128)])
    assert len(proof_prompt(short, 1000, 4096)) == 192
    for window in (192, 256):
        short = CacheLayout([plain.layers[0], windowed(plain.layers[1], window)])
        length = len(proof_prompt(short, 1000, 4096))
        assert length - window > length / 4, "more of them than may stray"
    long = CacheLayout([plain.layers[0], windowed(plain.layers[1], 4096)])
    assert len(proof_prompt(long, 1000, 4096)) == 64
    assert len(proof_prompt(plain, 1000, 20)) == 18
    tokens = proof_prompt(plain, 128_256, 4096)
    assert len(set(tokens)) == 64 and max(tokens) < 128_256 and max(tokens) > 100_000


def test_precision_by_name() -> None:
    names = {
        "float32": 32, "bfloat16": 16, "float16": 16, "fp8": 8, "modelopt": 4, "modelopt_fp4": 4,
        "mxfp4": 4, "8bit": 8, "4bit": 4, "6bit": 4, "3bit": 4, "awq_marlin": 4, "gptq": 4,
        "compressed-tensors": 4, "compressed-tensors-w8a8": 8, "w4a8": 4, "int8": 8, "": 4,
    }  # fmt: skip
    assert {name: bits(name) for name in names} == names


def made(folder: Path, text: bytes = b"weights" * 9999) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(text)
    return folder


ME = Introduction(
    ModelSignature("llama", 8, 100, []), full_attention(1, 2, 4, "float32"), "one", "vllm 0.32.0",
    "m", "bfloat16", "f" * 64,
)  # fmt: skip


def test_what_was_the_same_is_kept_in_a_file(tmp_path: Path) -> None:
    model, file = made(tmp_path / "model"), tmp_path / "state" / "proofs.json"
    proofs = Proofs(model, "float32", file)
    assert proofs.verdict(ME, "key") is None
    proofs.learn(ME, "key", Verdict(True, "0.1 % apart"))
    later = Proofs(model, "float32", file)
    assert later.verdict(ME, "key") == Verdict(True, "0.1 % apart")
    replaced = msgspec.structs.replace
    assert later.verdict(replaced(ME, client="two"), "key") is not None, "vLLM was started again"
    for other in (
        {"engine": "vllm 0.33.0"}, {"weights": "fp8"}, {"fingerprint": "e" * 64},
        {"layout": full_attention(1, 2, 4, "bfloat16")}, {"fingerprint": ""},
    ):  # fmt: skip
        assert later.verdict(replaced(ME, **other), "key") is None, other
    assert later.verdict(ME, "another machine's") is None
    assert Proofs(model, "bfloat16", file).verdict(ME, "key") is None
    assert (
        Proofs(made(tmp_path / "tuned", b"Weights" * 9999), "float32", file).verdict(ME, "key")
        is None
    )


def test_what_may_change_is_not(tmp_path: Path) -> None:
    model, file = made(tmp_path / "model"), tmp_path / "proofs.json"
    unknown = msgspec.structs.replace(ME, fingerprint="")
    proofs = Proofs(model, "float32", file)
    proofs.learn(ME, "key", Verdict(False, "141 % apart"))
    proofs.learn(unknown, "key", Verdict(True, "0.1 % apart"))
    assert proofs.verdict(ME, "key") == Verdict(False, "141 % apart")
    assert proofs.verdict(unknown, "key") is not None
    later = Proofs(model, "float32", file)
    assert later.verdict(ME, "key") is None and later.verdict(unknown, "key") is None


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"a": 1}', b"\xff\xfe"])
def test_a_damaged_file_is_no_reason_to_stop(tmp_path: Path, damage: bytes) -> None:
    file = tmp_path / "proofs.json"
    file.write_bytes(damage)
    proofs = Proofs(made(tmp_path / "model"), "float32", file)
    assert proofs.verdict(ME, "key") is None
    proofs.learn(ME, "key", Verdict(True, "0.1 % apart"))
    assert Proofs(tmp_path / "model", "float32", file).verdict(ME, "key") is not None


def test_the_file_does_not_grow_for_ever(tmp_path: Path) -> None:
    file = tmp_path / "proofs.json"
    proofs = Proofs(made(tmp_path / "model"), "float32", file)
    for number in range(300):
        other = msgspec.structs.replace(ME, fingerprint=f"{number:064}")
        proofs.learn(other, "key", Verdict(True, "same"))
    assert len(msgspec.json.decode(file.read_bytes())) == 256


def test_fingerprints(tmp_path: Path) -> None:
    one = fingerprint.of_folder(made(tmp_path / "one"))
    assert one == fingerprint.of_folder(made(tmp_path / "copy")) != ""
    weights = bytearray(b"weights" * 9999)
    weights[3] ^= 1
    assert fingerprint.of_folder(made(tmp_path / "changed", bytes(weights))) != one
    (tmp_path / "copy" / "config.json").write_text('{"rope_theta": 1}')
    assert fingerprint.of_folder(tmp_path / "copy") != one
    (tmp_path / "empty").mkdir()
    assert fingerprint.of_folder(tmp_path / "empty") == ""
    assert fingerprint.of_folder(tmp_path / "nowhere") == ""
