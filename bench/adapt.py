"""Whether plans follow: a link that becomes slow and fast again, a Mac and a vLLM that are busy.

    python -m bench.adapt                      # writes bench/results/adapt.json
    python -m bench.adapt --requests 8 --choices auto,always

Requests come one after the other over a shaped link, through stages whose beginnings nobody is
told of: once with ``offload="auto"``, and once with each fixed choice. Both engines only wait for
as long as ``bench.adapt_paced`` says, what is between them is real. Needs root, for the link.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Final

from bench.adapt_paced import MAC, OUTPUT, PROMPT, SHAPE, VLLM
from bench.lab import RESULTS, Child, Place, record, save, shaped_link

#: Of each: a name, the link's rate, texts that others have the Mac decode, prompts that vLLM has to
#: prefill first, and texts that it decodes.
STAGES: Final = (
    ("10 Gbit/s", "10gbit", 0, 0, 0),
    ("1 Gbit/s", "1gbit", 0, 0, 0),
    ("100 Mbit/s", "100mbit", 0, 0, 0),
    ("10 Gbit/s again", "10gbit", 0, 0, 0),
    ("the Mac is busy", "10gbit", 10, 0, 0),
    ("both are idle", "10gbit", 0, 0, 0),
    ("vLLM is busy", "10gbit", 0, 5, 8),
)
CHOICES: Final = ("auto", "always", "meet", "mac", "never")

#: Requests after which the choice should have followed.
FEW: Final = 4


def shape(places: tuple[Place, Place], rate: str) -> None:
    """Another rate, both ways, in the middle of everything."""
    for place in places:
        command = ["tc", "qdisc", "change", "dev", place.device, "root", "tbf"]
        what = f"rate {rate} burst {'2mb' if rate == '10gbit' else '256kb'} limit 4mb".split()
        subprocess.run(place.command([*command, *what]), check=True, capture_output=True)


def measure(requests: int, choices: list[str], model: str, cache: str) -> dict[str, Any]:
    """For each choice and stage, what each request took and how it was done."""
    found: dict[str, Any] = {choice: {} for choice in choices}
    with contextlib.ExitStack() as stack:
        places = stack.enter_context(shaped_link())
        at_spark, at_mac = places
        me = ("-m", "bench.adapt_paced")
        receiver = stack.enter_context(Child(at_mac, *me, "mac", at_mac.address, model, cache))
        ready = receiver.answer()
        found["measured"] = {key: ready[key] for key in ("prefill_s", "decode_s")}
        for choice in choices:
            shape(places, STAGES[0][1])
            receiver.ask(rows=0)
            arguments = ("spark", at_mac.address, str(ready["port"]), choice, model)
            with Child(at_spark, *me, *arguments) as engine:
                engine.answer()
                engine.ask(queue=0, rows=0)  # connections, and memory that is touched first
                for name, rate, busy, queue, rows in STAGES:
                    shape(places, rate)
                    receiver.ask(rows=busy)
                    each = [engine.ask(queue=queue, rows=rows) for _ in range(requests)]
                    found[choice][name] = each
                    times = [one["seconds"] for one in each]
                    print(
                        f"{choice:7} {name:16} {statistics.mean(times):.2f} s  "
                        + " ".join(f"{one['strategy']} {one['seconds']:.2f}" for one in each),
                        flush=True,
                    )
    return found


def summary(found: dict[str, Any], choices: list[str]) -> list[dict[str, Any]]:
    """A row for each stage."""
    rows = []
    for name, *_ in STAGES:
        mean = {
            choice: statistics.mean(one["seconds"] for one in found[choice][name])
            for choice in choices
        }
        row: dict[str, Any] = {"stage": name, "mean_s": mean}
        fixed = {choice: value for choice, value in mean.items() if choice != "auto"}
        if "auto" in mean and fixed:
            each = found["auto"][name]
            strategies = [one["strategy"] for one in each]
            last = strategies[-1]
            settled = len(strategies) - next(
                (i for i, s in enumerate(reversed(strategies)) if s != last), len(strategies)
            )
            row |= {
                "best": min(fixed, key=fixed.__getitem__),
                "auto_over_best": mean["auto"] / min(fixed.values()),
                "auto_over_best_later": statistics.mean(
                    one["seconds"] for one in each[FEW:] or each
                )
                / min(fixed.values()),
                "chosen": last,
                "followed_after": settled,
                "changes": sum(a != b for a, b in itertools.pairwise(strategies)),
            }
        rows.append(row)
    return rows


def main() -> None:
    """Measure, and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=16, help="in each stage")
    parser.add_argument("--choices", default=",".join(CHOICES))
    parser.add_argument("--out", type=Path, default=RESULTS / "adapt.json")
    options = parser.parse_args()
    choices = options.choices.split(",")
    result = record("mean completion times through changing conditions, by who does what")
    from tests.models import tiny_llama

    with tempfile.TemporaryDirectory() as scratch:
        model = str(tiny_llama(Path(scratch) / "paced", dtype="bfloat16", **SHAPE))
        found = measure(options.requests, choices, model, str(Path(scratch) / "cache"))
    errors = sorted(
        one["error"]
        for stage in found.get("auto", {}).values()
        for one in stage
        if one["error"] is not None
    )
    result |= {
        "prompt_tokens": PROMPT,
        "output_tokens": OUTPUT,
        "paced": {
            "vllm_prefill_s": VLLM.prefill.seconds(PROMPT),
            "vllm_step_s": VLLM.decode.seconds(0),
            "mac_prefill_s": MAC.prefill.seconds(PROMPT),
            "mac_step_s": MAC.decode.seconds(0),
        },
        "measured": found.pop("measured"),
        "rows": summary(found, choices),
        "errors": {
            "requests": len(errors),
            "p50": round(statistics.median(abs(e - 1) for e in errors), 3) if errors else None,
            "p90": round(sorted(abs(e - 1) for e in errors)[int(0.9 * len(errors))], 3)
            if errors
            else None,
        },
        "requests": found,
    }
    save(result, options.out)
    for row in result["rows"]:
        print(row)
    print(result["errors"])


if __name__ == "__main__":
    main()
