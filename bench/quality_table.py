"""docs/models.md's table of a hand-off's quality, from the rows of ``bench.quality``."""

from __future__ import annotations

from itertools import groupby
from typing import Any

#: As publishers write them.
NAMES = {"gemma-3-270m": "Gemma-3-270M"}

#: Columns: between which two, and whose perplexity with which difference.
PAIRS = ("handoff_from_vllm", "handoff_from_mac", "engines")


def quality_table(rows: list[dict[str, Any]]) -> str:
    """Of every pair that was measured twice, with the same digits; another is left out."""
    lines = [
        "| bf16 in vLLM, on the Mac | | hand-off from vLLM alone | hand-off from the Mac alone | "
        "Mac from vLLM |",
        "|---|---|---|---|---|",
    ]
    for (name, bits, kv), runs in groupby(sorted(rows, key=_order), _pair):
        cells = [_cells(run) for run in runs]
        if len(cells) < 2 or cells[1:] != cells[:-1]:
            continue
        title = f"{name}, {bits} bits" + (f", vLLM's KV in `{kv}`" if kv != "auto" else "")
        for what, *columns in cells[0]:
            lines.append(f"| {' | '.join((title, what, *columns))} |")
            title = ""
    return "\n".join(lines) + "\n"


def _pair(row: dict[str, Any]) -> tuple[str, int, str]:
    return NAMES.get(row["model"], row["model"]), row["bits"], row.get("kv", "auto")


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    name, bits, kv = _pair(row)
    return name != "SmolLM2-135M-Instruct", name, kv, -bits


def _cells(row: dict[str, Any]) -> list[tuple[str, ...]]:
    text, responses = ([row[key][pair] for pair in PAIRS] for key in ("text", "responses"))
    p = row["text"]["perplexity"]
    return [
        ("mean KL, nats", *(_with_error(one["mean_kl"], one["error"]) for one in text)),
        ("same top token", *(f"{one['same_top_token']:.1%}".replace("%", " %") for one in text)),
        (
            "perplexity (difference)",
            f"{p['handoff']:.2f} ({p['difference_vllm']:+.2f})",
            f"{p['handoff']:.2f} ({p['difference_mac']:+.2f})",
            f"{p['mac']:.2f} ({p['mac'] - p['vllm']:+.2f})",
        ),
        (
            "own responses: mean KL, same top token",
            *(
                f"{_kl(one['mean_kl'])}, {one['same_top_token']:.1%}".replace("%", " %")
                for one in responses
            ),
        ),
    ]


def _with_error(nats: float, error: float) -> str:
    return f"{nats:.{_digits(nats)}f} ± {error:.{_digits(nats)}f}"


def _kl(nats: float) -> str:
    return f"{nats:.{_digits(nats)}f}"


def _digits(nats: float) -> int:
    return 4 if nats < 0.01 else 3
