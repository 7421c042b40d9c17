"""What is said of the model: what its configuration describes, and what not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import free_port
from vllm_mac_decode.settings import Settings
from vllm_mac_decode.tools.check import Report, run_checks
from vllm_mac_decode.tools.check.engine import EngineFacts
from vllm_mac_decode.tools.check.receiver import check_model, read_model


def test_a_model_of_keys_and_values(tiny_llama_path: Path) -> None:
    found = check_model("m", read_model(str(tiny_llama_path)))
    assert found.state == "fine" and "KiB of KV a token" in found.seen


OTHERS: list[dict[str, Any]] = [
    {"kv_lora_rank": 512},
    {"num_kv_shared_layers": 2},
    {"attention_chunk_size": 128},
    {"hybrid_override_pattern": "M-M*"},
    {"layer_types": ["conv", "full_attention"] * 2},
    {"layer_types": ["linear_attention"] * 3 + ["full_attention"]},
    {"mamba_d_state": 16},
]


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: next(iter(other)))
def test_only_the_engine_knows_other_caches(
    tiny_llama_path: Path, tmp_path: Path, other: dict[str, Any]
) -> None:
    config = json.loads((tiny_llama_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | other))
    started: list[str] = []

    def start(model: str) -> EngineFacts:
        started.append(model)
        return EngineFacts(hooks=True)

    settings = Settings(receiver=f"127.0.0.1:{free_port()}")
    *_, report = run_checks(settings, str(tmp_path), start)
    assert isinstance(report, Report)
    (model,) = [found for found in report.findings if found.name == "model"]
    assert model.state == "warning" and "vLLM compares" in model.remedy
    assert started == [str(tmp_path)]


def test_a_model_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name, seen in (("/no/such/folder", "no such folder"), (str(tmp_path), "num_attention")):
        *_, report = run_checks(Settings(), name, lambda model: EngineFacts(hooks=True))
        assert isinstance(report, Report)
        assert not report.ready
        assert any(seen in f.seen and f.remedy == "Check --model" for f in report.findings)
