"""The README's table of measured figures, from the results in ``bench/results``.

python -m bench.table                     # print it
python -m bench.table --write README.md   # replace what is between the two marker comments
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.lab import RESULTS

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"

Row = tuple[str, str, str]


def transport_rows(result: dict[str, Any]) -> Iterator[Row]:
    """Rate and CPU time of each transport, beside what limits it."""
    size = f"{result['bytes'] / 1e9:.2f} GB"
    for link, rows in result["links"].items():
        plain = next(row for row in rows if row["transport"] == "sockets")
        limit = f"memcpy {result['floors']['memcpy_gb_per_s']:.1f} GB/s"
        if link != "loopback":
            limit = f"link {result['floors']['link_10gbit_gb_per_s']:.2f} GB/s"
        for row in rows:
            if row is plain:
                continue
            yield (
                f"{size} of KV into finished MLX caches, CPU time of both sides, "
                f"`{row['transport']}`, {link}",
                f"{row['gb_per_s']:.2f} GB/s, {row['cpu_s_per_gb_both']:.2f} CPU-s/GB",
                f"{limit}; plain sockets {plain['gb_per_s']:.2f} GB/s, "
                f"{plain['cpu_s_per_gb_both']:.2f} CPU-s/GB",
            )


def replay_rows(result: dict[str, Any]) -> Iterator[Row]:
    """Totals of the paced replay, beside the published total or the computation alone."""
    names = {
        "streamed": "streamed layer by layer",
        "chunked": f"streamed, {result['chunk']:,}-token steps",
        "afterwards": "sent after prefill",
    }
    for row in result["rows"]:
        floor = f"computation alone {row['compute_floor_s']:.2f} s"
        if row["tokens"] == result["published"]["tokens"]:
            floor = f"published {result['published']['together']:.2f} s"
        yield (
            f"Paced replay, {row['tokens']:,} tokens, KV {names[row['variant']]}",
            f"{row['total_s']:.2f} s, {1e3 * row['exposed_s']:.0f} ms of it transfer not hidden",
            f"{floor}; link alone {row['link_floor_s']:.2f} s",
        )


def overlap_rows(result: dict[str, Any]) -> Iterator[Row]:
    """Time to the first token with the export on."""
    for row in result["rows"]:
        local, handed = row["first_token_local_ms"], row["first_token_handed_off_ms"]
        yield (
            f"First token on {result['machine']['gpu']}, {row['prompt_tokens']:,} tokens, "
            "KV streamed out",
            f"{handed['median']:.1f} ms ({row['slowdown_percent']:+.1f}%)",
            f"kept local {local['median']:.1f} ms ({local['min']:.1f} to {local['max']:.1f})",
        )


SOURCES = {
    "transport.json": transport_rows,
    "replay.json": replay_rows,
    "overlap_gpu.json": overlap_rows,
}


def table(results: Path) -> str:
    """The markdown, with a line for each result file that says where and when."""
    lines = ["| what | measured | beside it |", "|---|---|---|"]
    notes = []
    for name, rows in SOURCES.items():
        path = results / name
        if not path.exists():
            continue
        result = json.loads(path.read_text())
        lines += [f"| {what} | {measured} | {beside} |" for what, measured, beside in rows(result)]
        machine = result["machine"]
        where = machine.get("gpu") or f"{machine['cores']} cores of {machine['cpu']}"
        notes.append(
            f"`bench/results/{name}`: {where}, {result['date'][:10]}, `{result['command']}`."
        )
    return "\n".join([*lines, "", *(f"{note}  " for note in notes)]).rstrip() + "\n"


def main() -> None:
    """Print the table or put it where the markers are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", type=Path, help="a file with the two marker comments")
    options = parser.parse_args()
    text = table(options.results)
    if options.write is None:
        print(text, end="")
        return
    page = options.write.read_text()
    if BEGIN not in page or END not in page:
        parser.error(f"{options.write} lacks {BEGIN} or {END}")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    options.write.write_text(f"{before}{BEGIN}\n{text}{END}{after}")


if __name__ == "__main__":
    main()
