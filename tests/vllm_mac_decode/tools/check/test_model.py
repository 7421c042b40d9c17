"""A model that cannot be handed off, or not even read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from mlx_receiver.wire.handshake import Introduction
from tests.conftest import free_port
from vllm_mac_decode.settings import Settings
from vllm_mac_decode.tools.check import Report, run_checks
from vllm_mac_decode.tools.check.engine import EngineFacts
from vllm_mac_decode.tools.check.receiver import check_model, read_model


def test_a_model_that_cannot_be_handed_off(tiny_llama_path: Path) -> None:
    model = read_model(str(tiny_llama_path))
    assert check_model("m", model).state == "fine"

    def other(**fields: Any) -> Introduction:
        signature = msgspec.structs.replace(model.signature, **fields)
        return msgspec.structs.replace(model, signature=signature)

    assert "'mamba' are not supported" in check_model("m", other(model_type="mamba")).seen


def test_nothing_is_tried_with_a_model_that_cannot_be_handed_off(
    tiny_llama_path: Path, tmp_path: Path
) -> None:
    config = json.loads((tiny_llama_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
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
