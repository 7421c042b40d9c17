"""What the engine says of its memory, its hooks and its cache."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from vllm_mac_decode.tools.check import engine
from vllm_mac_decode.tools.check.engine import EngineFacts
from vllm_mac_decode.tools.check.finding import Finding

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
