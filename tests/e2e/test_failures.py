"""Whatever happens to the receiver, every response completes and is right."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.faults import run

pytestmark = pytest.mark.server


def test_a_dozen_random_faults_under_load(tiny_llama_path: Path, tmp_path: Path) -> None:
    result = run(tiny_llama_path, tmp_path, trials=12, seed=5)
    assert result["responses_wrong"] == 0, result["problems"]
    assert result["responses_right"] >= 20
    assert result["fell_back"]["all"] > 0
    assert result["decoded_by_receiver"] > 0
