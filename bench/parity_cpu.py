"""Greedy parity of model families on a CPU: vLLM prefill -> MLX decode against MLX alone.

The small random models of ``tests/families.py``, as ``tests/e2e/test_families.py`` compares them:
six prompts around a window, at once, prefilled in chunks. Each call adds a run, in new processes,
of the families that it names (by default all); runs of other versions are dropped.

    python -m bench.parity_cpu gpt_oss gemma4
    python -m bench.parity_cpu --dtype bfloat16 qwen3_5   # a gated delta net by vLLM's own kernels
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from bench.lab import RESULTS, record, save
from tests.e2e.handing_off import OUTPUT, PROMPTS, Offline, Outcome, hand_off
from tests.families import FAMILIES, NOT_COMPARED

RESULT = RESULTS / "parity_families_cpu.json"


def run_of(outcome: Outcome) -> dict[str, Any]:
    """One run's figures."""
    pairs = zip(outcome.tokens, outcome.by_mlx_alone, strict=True)
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "load_1min": round(os.getloadavg()[0], 1),
        "equal": sum(got == alone for got, alone in pairs),
        "of": len(outcome.tokens),
        "decoded_by_receiver": outcome.handed_off,
        "of_tokens": outcome.wanted,
        "proof": outcome.proof,
        "kv_bytes": {
            str(h["prompt_tokens"]): h["kv_bytes"]
            for h in outcome.handoffs
            if h["output_tokens"] and not h["held_tokens"]
        },
    }


def add(families: list[str], path: Path, dtype: str) -> None:
    """Run each and write the result after each."""
    lengths = ", ".join(str(len(prompt)) for prompt in PROMPTS)
    result = record(
        f"greedy tokens of vLLM CPU prefill + MLX CPU decode against MLX CPU alone; prompts of "
        f"{lengths} tokens, {OUTPUT} tokens each, at once, in chunks of 64"
    ) | {"rows": []}
    if path.exists():
        before = json.loads(path.read_text())
        if before["versions"] == result["versions"]:
            result["rows"] = before["rows"]
    result["command"] = "python -m bench.parity_cpu FAMILY ..."
    with tempfile.TemporaryDirectory() as folder:
        offline = Offline(Path(folder) / "vllm.log")
        try:
            for family in families:
                place = Path(folder) / family
                place.mkdir()
                try:
                    outcome = hand_off(family, offline, place, dtype=dtype)
                except (AssertionError, pytest.skip.Exception) as error:  # the others may run
                    print(f"{family}: {error}", flush=True)
                    continue
                config = json.loads((outcome.model / "config.json").read_text())
                key = {"family": family, "model": config["model_type"], "dtype": dtype}
                row = next((row for row in result["rows"] if key.items() <= row.items()), None)
                if row is None:
                    row = key | {"runs": []}
                    result["rows"].append(row)
                row["runs"].append(run_of(outcome))
                print(json.dumps({"family": family} | row["runs"][-1]), flush=True)
                order = list(FAMILIES)
                result["rows"].sort(key=lambda row: (order.index(row["family"]), row["dtype"]))
                save(result, path)
        finally:
            offline.close()


def main() -> None:
    """Add a run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [name for name in FAMILIES if name not in NOT_COMPARED]
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=", ".join(known))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--results", type=Path, default=RESULT)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # what runs is ended then
    add(options.families or known, options.results, options.dtype)


if __name__ == "__main__":
    main()
