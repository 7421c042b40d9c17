"""The tables of models: parity and quality from ``bench/results``, sizes from
``mlx_receiver/planning/published.py``.

    python -m bench.model_table           # exit status 1 when a page does not have them
    python -m bench.model_table --write   # into docs/models.md and README.md

Sizes and seconds are computed, not measured: bytes by ``CacheLayout.nbytes`` in bf16, divided by
the rate of a 10 Gbit link.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from bench.lab import LINK_10G, RESULTS
from bench.quality_table import quality_table
from mlx_receiver.planning.published import PUBLISHED, Published
from mlx_receiver.planning.shapes import fixed_bytes, layout_of, token_bytes, wire_dtypes
from tests.families import FAMILIES, NOT_COMPARED

ROOT = RESULTS.parent.parent
BEGIN, END = "<!-- {}: begin -->", "<!-- {}: end -->"

LENGTHS = (8 << 10, 32 << 10, 128 << 10)

#: What each layer keeps, and the model types; ``tests/families.py`` has a model of each.
KEPT = {
    "K and V": (
        "llama", "qwen2", "qwen3", "qwen3_moe", "glm4", "glm4_moe", "minimax_m2", "ministral3",
        "mistral", "gemma2", "mixtral", "phi3", "granite", "olmo2", "seed_oss", "ernie4_5",
        "smollm3",
    ),
    "K and V, or a window's": ("gpt_oss", "gemma3_text", "olmo3", "exaone4", "cohere2"),
    "the same; some layers read an earlier one's": ("gemma4_text", "gemma3n"),
    "K and V, or a chunk's": ("llama4",),
    "a latent and a rotated key (MLA)": ("deepseek_v2", "deepseek_v3", "glm4_moe_lite"),
    "a Mamba 2 state, or K and V": ("nemotron_h", "granitemoehybrid"),
    "both": ("falcon_h1",),
    "a Mamba 1 state, or K and V": ("jamba",),
    "a short convolution's state, or K and V": ("lfm2",),
    "a gated delta net's state, or K and V": ("qwen3_next", "qwen3_5", "qwen3_5_moe"),
}  # fmt: skip

#: What the README shows.
HEADLINES = (
    "Llama-3.1-8B", "gpt-oss-120b", "Qwen3.5-35B-A3B", "GLM-4.5-Air", "Gemma-4-31B",
    "Nemotron-3-Nano-30B-A3B", "DeepSeek-V3",
)  # fmt: skip

#: What the tests compare, and of which no run is recorded.
IN_TESTS, NOT_RUN = "in the tests", "not run"

Row = tuple[str, ...]


def on_cpu(results: Path) -> dict[str, str]:
    """For each model type how many prompts of all runs gave MLX's own tokens."""
    cells = {family: IN_TESTS for family in FAMILIES if family not in NOT_COMPARED}
    rows = _rows(results / "parity_families_cpu.json")
    for row in sorted(rows, key=lambda row: row["dtype"] != "float32"):
        runs = row["runs"]
        text = f"{sum(run['equal'] for run in runs)} of {sum(run['of'] for run in runs)}"
        if any(run["decoded_by_receiver"] < run["of_tokens"] for run in runs):
            text += ", not all handed off"
        kind = _kind(row["model"])
        before = "" if row["dtype"] == "float32" or cells[kind] == IN_TESTS else f"{cells[kind]}; "
        cells[kind] = before + text + _dtype(row)
    return cells


def on_cuda(results: Path) -> dict[str, str]:
    """The same of the runs on a GPU: in fp32, or in bf16 where no kernel of vLLM's computes fp32;
    where not all are, also what vLLM's own decode gives."""
    rows = _rows(results / "parity_gpu.json") + _rows(results / "parity_families_gpu.json")
    # Behind a cache of fewer bits tokens need not be MLX's.
    rows = [row for row in rows if row.get("kv_cache_dtype", "auto") == "auto"]
    cells: dict[str, str] = {}
    for row in sorted(rows, key=lambda row: row["dtype"] == "float32"):  # fp32 goes before
        text = f"{row['equal']} of {row['of']}" + _dtype(row)
        if row["equal"] < row["of"]:
            text += f"; vLLM alone {row['vllm_alone_equal']} of {row['of_vllm_alone']}"
        cells[_kind(row["model"])] = text
    return cells


def _kind(model_type: str) -> str:
    """A model's language part is of the same family."""
    return model_type.removesuffix("_text")


def _rows(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["rows"] if path.exists() else []


def _dtype(row: dict[str, Any]) -> str:
    return "" if row["dtype"] == "float32" else f" in {row['dtype'].replace('bfloat', 'bf')}"


def sizes(model: Published) -> Row:
    """Its cells: bytes a token, once, seconds for each length."""
    layout = layout_of(model.config, *wire_dtypes(model.config, "bfloat16"))
    seconds = (layout.nbytes(tokens) / LINK_10G for tokens in LENGTHS)
    once = fixed_bytes(layout)
    return (
        f"{token_bytes(layout):,}",
        f"{once / 1e6:.0f} MB" if once else "-",
        *(f"{each:.2f}" for each in seconds),
    )


def whole(results: Path) -> str:
    """The table of docs/models.md; types without a published model that have the same cells share
    a row."""
    cpu, cuda = on_cpu(results), on_cuda(results)
    lines = [
        "| model type | each layer keeps | vLLM CPU | vLLM CUDA | for example | bytes a token | "
        "once | s for 8k | 32k | 128k |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for kept, types in KEPT.items():
        rows = [
            (kind, cpu.get(_kind(kind), NOT_RUN), cuda.get(_kind(kind), NOT_RUN), model)
            for kind in types
            for model in _examples(kind)
        ]
        for (*cells, example), group in groupby(rows, lambda row: (*row[1:3], row[3])):
            kinds = ", ".join(f"`{row[0]}`" for row in group)
            end = (example.name, *sizes(example)) if example else ("",) * 6
            lines.append(_line(kinds, kept, *cells, *end))
    return "\n".join(lines) + "\n"


def headlines(results: Path) -> str:
    """The README's table."""
    cpu, cuda = on_cpu(results), on_cuda(results)
    lines = [
        "| model | equal to MLX alone: vLLM CPU | vLLM CUDA | KV bytes a token | once | 8k tokens "
        "at 10 Gbit/s | 32k | 128k |",
        "|---|---|---|---|---|---|---|---|",
    ]
    by_name = {model.name: model for model in PUBLISHED}
    for name in HEADLINES:
        token, once, *seconds = sizes(by_name[name])
        kind = _kind(by_name[name].model_type)
        parity = cpu.get(kind, NOT_RUN), cuda.get(kind, NOT_RUN)
        lines.append(_line(name, *parity, token, once, *(f"{each} s" for each in seconds)))
    return "\n".join(lines) + "\n"


def _examples(kind: str) -> list[Published | None]:
    found: list[Published | None] = [one for one in PUBLISHED if one.model_type == kind]
    return found or [None]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def pages(results: Path) -> Iterator[tuple[Path, str, str]]:
    """Each page, as it is and as it should be."""
    rows = _rows(results / "quality.json")
    for page, tables in (
        (ROOT / "docs" / "models.md", {"models": whole(results), "quality": quality_table(rows)}),
        (ROOT / "README.md", {"models": headlines(results)}),
    ):
        text = wanted = page.read_text()
        for name, table in tables.items():
            begin, end = BEGIN.format(name), END.format(name)
            before, rest = wanted.split(begin)
            wanted = f"{before}{begin}\n{table}{end}{rest.split(end)[1]}"
        yield page, text, wanted


def main() -> int:
    """Compare, or write."""
    stale = False
    for page, text, wanted in pages(RESULTS):
        if "--write" in sys.argv:
            page.write_text(wanted)
        elif text != wanted:
            print(f"{page.name} does not have today's models: python -m bench.model_table --write")
            stale = True
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
