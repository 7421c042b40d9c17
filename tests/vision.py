"""What vLLM imports for models that also see: torchvision, which ``.ci/install_cpu.py`` puts into a
folder of its own. ``tests/patience/sitecustomize.py`` says how it is imported there."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

import pytest

#: Names that folder to the processes that shall have it.
VARIABLE: Final = "TESTS_VISION"

_FOLDER: Final = Path(os.environ.get(VARIABLE) or Path(sys.prefix) / "vision")


def seeing() -> dict[str, str]:
    """The environment of a process with it; without it the test is skipped."""
    if not (_FOLDER / "torchvision").is_dir():
        pytest.skip("torchvision is not installed: run .ci/install_cpu.py again")
    return {VARIABLE: str(_FOLDER)}
