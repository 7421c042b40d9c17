"""What `mac-decode check` says of who will do what."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import pytest

from mlx_receiver.planning import cached
from mlx_receiver.receiver import Receiver
from mlx_receiver.wire import messages as m
from mlx_receiver.wire.keys import new_ticket
from mlx_receiver.wire.profile import Decode, Prefill, Profile
from vllm_mac_decode.settings import Settings
from vllm_mac_decode.tools.check import Report, run_checks
from vllm_mac_decode.tools.check.engine import EngineFacts
from vllm_mac_decode.tools.check.finding import Finding
from vllm_mac_decode.tools.check.planned import check_plan
from vllm_mac_decode.tools.check.receiver import read_model
from vllm_mac_decode.tools.check.transfer import Transfer

MAC = Profile("r", "m", Prefill(0.0, 1e-3, 0.0, 2048), Decode(0.02, 0.0, 0.0))


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cached.CACHE_VARIABLE, str(tmp_path / "cache"))


def keep(model: Path, step: float) -> None:
    """vLLM has measured itself with this model."""
    profile = Profile("v", str(model), Prefill(0.0, 1e-4, 0.0, 8192), Decode(step, 0.0, 0.0))
    key = {"model": str(model)}
    cached.write(cached.Saved(side="vllm", key=key, profile=profile, made=time.time()))


def planned(
    model: Path, offload: str = "auto", profile: Profile | None = MAC, most: int = 100_000
) -> Finding:
    settings = msgspec.convert({"offload": offload}, Settings)
    welcome = m.Welcome("r", "m", "e", [], new_ticket(), most, ["raw"], profile=profile)
    layout = read_model(str(model)).layout
    return check_plan(settings, f"{model}/", layout, welcome, Transfer(1_000_000_000, 1.0))


def test_it_says_what_is_faster_and_why(tiny_llama_path: Path) -> None:
    keep(tiny_llama_path, 0.08)
    found = planned(tiny_llama_path)
    assert found.state == "fine"
    assert "offload=auto, 8,192 tokens in and 256 out. Split, KV streamed, " in found.seen
    assert found.figures["split"] == pytest.approx(0.82 + 255 * 0.02, rel=0.02)
    assert found.figures["vllm"] == pytest.approx(0.82 + 255 * 0.08, rel=0.02)


@pytest.mark.parametrize(("codec", "ratio"), [("raw", 1.0), ("q8", 0.28), ("auto", 0.28)])
def test_the_codec_is_the_one_that_requests_get(
    tiny_qwen3_path: Path, codec: str, ratio: float
) -> None:
    keep(tiny_qwen3_path, 0.08)
    settings = msgspec.convert({"codec": codec}, Settings)
    welcome = m.Welcome("r", "m", "e", [], new_ticket(), 2000, ["raw", "q8"], profile=MAC)
    layout = read_model(str(tiny_qwen3_path)).layout
    link = layout.bytes_per_token * 100  # a second for a hundred tokens
    found = check_plan(settings, str(tiny_qwen3_path), layout, welcome, Transfer(link, 1.0))
    assert found.figures["split"] == pytest.approx(1744 / 100 * ratio + 255 * 0.02, rel=0.05)


def test_where_vllm_is_faster_it_says_that_requests_stay(tiny_llama_path: Path) -> None:
    keep(tiny_llama_path, 0.01)
    found = planned(tiny_llama_path)
    assert found.state == "warning"
    assert "All on vLLM, " in found.seen and found.seen.endswith("Such requests stay in vLLM")
    assert "offload=always" in found.remedy


def test_the_receivers_context_is_kept_to(tiny_llama_path: Path) -> None:
    keep(tiny_llama_path, 0.08)
    assert ", 1,792 tokens in" in planned(tiny_llama_path, most=2048).seen
    assert ", 1 tokens in" in planned(tiny_llama_path, most=64).seen


def test_what_is_not_measured_yet(tiny_llama_path: Path) -> None:
    assert "vLLM and the receiver will be" in planned(tiny_llama_path, profile=None).seen
    assert "auto: vLLM will be measured" in planned(tiny_llama_path).seen
    keep(tiny_llama_path, 0.08)
    found = planned(tiny_llama_path, profile=None)
    assert "auto: the receiver will be" in found.seen and found.state == "fine"
    keep(Path("/models/another"), 0.08)
    assert planned(tiny_llama_path).figures, "the one of another model is another one"


def test_other_settings(tiny_llama_path: Path) -> None:
    keep(tiny_llama_path, 0.01)
    always = planned(tiny_llama_path, "always")
    assert (always.state, always.figures) == ("fine", {})
    never = planned(tiny_llama_path, "never")
    assert never.state == "warning" and "no request is handed off" in never.seen


def test_it_is_in_the_report(real: Receiver, tiny_llama_path: Path) -> None:
    settings = Settings(receiver=f"127.0.0.1:{real.port}", token="secret")
    *_, report = run_checks(settings, str(tiny_llama_path), lambda model: EngineFacts(hooks=True))
    assert isinstance(report, Report)
    names = [found.name for found in report.findings]
    assert names.index("plan") == names.index("data path") + 1
    assert report.ready
