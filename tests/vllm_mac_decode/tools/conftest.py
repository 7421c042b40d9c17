"""A receiver for the commands to talk to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from mlx_receiver.receiver import Receiver


@pytest.fixture(scope="module")
def real(tiny_llama_path: Path) -> Iterator[Receiver]:
    """A receiver with the token "secret"."""
    pytest.importorskip("mlx.core")
    from tests.mlx_receiver.client import started

    with started(tiny_llama_path, http_port=0, token="secret") as receiver:
        yield receiver
