"""What is written: figures, versions and hardware, and nothing that is a secret or a path."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from vllm_mac_decode import __version__
from vllm_mac_decode.tools import timeline

FORMAT = 1

WAYS = ("vllm_alone", "mac_alone", "together")


def spread(values: list[float], digits: int = 4) -> dict[str, float]:
    """Median, ninth decile, and the range."""
    found = np.percentile(values, (50, 90, 0, 100))
    return {
        name: round(float(value), digits)
        for name, value in zip(("p50", "p90", "min", "max"), found, strict=True)
    }


def of_way(runs: list[list[float]]) -> dict[str, Any]:
    """One way's figures in seconds, from the times of each run's tokens."""
    steps = [later - sooner for times in runs for sooner, later in pairwise(times[1:])]
    return {
        "first_token_s": spread([times[0] for times in runs]),
        "total_s": spread([times[-1] for times in runs]),
        "decode_s": spread([times[-1] - times[0] for times in runs]),
        "token_ms": spread([1000 * step for step in steps], 2) if steps else None,
        "runs": [[round(times[0], 4), round(times[-1], 4)] for times in runs],
    }


def of_handoffs(runs: list[list[float]], handoffs: list[timeline.Handoff]) -> dict[str, Any]:
    """What handing off cost: seen by the client, and by the receiver."""
    figures = [handoff.figures for handoff in handoffs]
    decoded = [f.handoff_gap_ms for f in figures if f.handoff_gap_ms is not None]
    return {
        "kv_bytes": handoffs[0].kv_bytes,
        # From vLLM's first token to the receiver's, a decode step included.
        "gap_ms": spread([1000 * (times[1] - times[0]) for times in runs], 2),
        "first_token_to_decoded_ms": spread(decoded, 2),
        "exposed_transfer_ms": spread([f.exposed_ms or 0.0 for f in figures], 2),
        "resident_at_first_token": spread([f.hidden_share or 0.0 for f in figures]),
    }


def public_model(name: str) -> str:
    """A model's name without the folders of the machine it is on."""
    path = name.replace("\\", "/").rstrip("/")
    return path if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) else path.rpartition("/")[2]


def hardware() -> dict[str, Any]:
    """This machine's."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "cpu": _cpu(),
        "gpus": _gpus(),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _gpus() -> list[str]:
    """Names, drivers and memory, as nvidia-smi has them."""
    wanted = "--query-gpu=name,driver_version,memory.total"
    try:
        said = subprocess.check_output(
            ["nvidia-smi", wanted, "--format=csv,noheader"],
            stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in said.splitlines() if line.strip()]


def versions() -> dict[str, str]:
    """Of this program and what it runs in."""
    found = {"vllm-mac-decode": __version__, "python": platform.python_version()}
    with contextlib.suppress(metadata.PackageNotFoundError):
        found["torch"] = metadata.version("torch")
    return found


def now() -> str:
    """The date and time in UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
