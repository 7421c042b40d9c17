"""Whatever happens to the receiver, every response completes and is right."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.faults import run

pytestmark = pytest.mark.server


@pytest.mark.parametrize(("offload", "trials"), [("always", 12), ("mac", 6)])
def test_random_faults_under_load(
    tiny_llama_path: Path,
    tmp_path: Path,
    offload: str,
    trials: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MAC_DECODE_OFFLOAD", offload)
    result = run(tiny_llama_path, tmp_path, trials=trials, seed=5)
    assert result["responses_wrong"] == 0, result["problems"]
    assert result["responses_right"] >= trials * 20 / 12
    assert result["fell_back"]["all"] > 0
    assert result["decoded_by_receiver"] > 0
