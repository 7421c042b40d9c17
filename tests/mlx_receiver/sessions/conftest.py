"""A receiver that keeps what texts leave."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_receiver.receiver import Receiver
from tests.mlx_receiver.client import started


@pytest.fixture(scope="module")
def keeping(tiny_llama_path: Path) -> Iterator[Receiver]:
    """Other tests' receivers keep nothing, so that equal prompts are sent again."""
    with started(tiny_llama_path, prompt_cache=True) as receiver:
        yield receiver
