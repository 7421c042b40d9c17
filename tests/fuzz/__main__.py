"""Fuzzes for as many cases as are asked for, and writes what was tried.

    python -m tests.fuzz --cases 1000000

A failure is hypothesis's: the smallest input that shows it is printed.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from rich.progress import Progress

from tests.fuzz.targets import TARGETS, fuzz

RESULT = Path(__file__).parents[2] / "bench" / "results" / "fuzz.json"


def main() -> None:
    """Give each target its share of the cases, with a seed of its own each time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=sorted(TARGETS), default=None)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    names = [options.only] if options.only else list(TARGETS)
    whole = sum(TARGETS[name].share for name in names)
    tried, began = {}, time.monotonic()
    with Progress() as progress:
        for name in names:
            wanted = -(-options.cases * TARGETS[name].share // whole)
            task = progress.add_task(name, total=wanted)
            seed, done = options.seed, 0
            while done < wanted:
                done += fuzz(name, examples=100, seed=seed)
                seed += 1
                progress.update(task, completed=min(done, wanted))
            tried[name] = done
    result = {
        "what": "structure-aware fuzzing",
        "command": f"python -m tests.fuzz --cases {options.cases} --seed {options.seed}",
        "cases": sum(tried.values()),
        "by_target": tried,
        "failures": 0,  # else hypothesis would have ended this
        "seconds": round(time.monotonic() - began),
        "date": time.strftime("%Y-%m-%d"),
    }
    print(json.dumps(result, indent=1))
    if options.only is None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
