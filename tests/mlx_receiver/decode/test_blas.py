"""A faster BLAS for MLX's CPU backend, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

PROGRAM = """
import sys
{before}
from mlx_receiver.decode.blas import use_fast_blas
found = use_fast_blas()
import mlx.core as mx
import numpy as np
a, b = (np.random.default_rng(i).standard_normal((65, 65), np.float32) for i in (1, 2))
with mx.stream(mx.cpu):
    product = np.array(mx.array(a) @ mx.array(b))
assert np.allclose(product, a @ b, atol=1e-4)
used = [line.split()[-1] for line in open("/proc/self/maps") if "openblas" in line]
print(found, found is None or found in used or found.startswith("lib"))
"""


def run(before: str = "", **env: str) -> str:
    program = [sys.executable, "-c", PROGRAM.format(before=before)]
    done = subprocess.run(
        program, capture_output=True, text=True, check=False, env=os.environ | env, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(find_spec("cv2") is None, reason="OpenBLAS comes with vLLM's OpenCV")
def test_what_is_installed_is_used_and_right() -> None:
    found, mapped = run().split()
    assert "openblas" in found, "vLLM brings OpenCV, which brings OpenBLAS"
    assert mapped == "True"


def test_mlxs_own_is_kept_on_demand_or_when_it_is_too_late() -> None:
    assert run(MLX_RECEIVER_BLAS="none") == "None True"
    assert run(before="import mlx.core") == "None True"


@pytest.mark.skipif(find_spec("cv2") is None, reason="OpenBLAS comes with vLLM's OpenCV")
def test_a_wrong_path_costs_nothing() -> None:
    assert "openblas" in run(MLX_RECEIVER_BLAS="/no/such/libblas.so")
