"""A folder for the keys of a test."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_receiver.pairing.keystore import STATE_VARIABLE


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where both sides' keystores are."""
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path))
    return tmp_path
