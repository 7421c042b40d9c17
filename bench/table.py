"""The tables of measured figures, from the results in ``bench/results``.

python -m bench.table             # print all of it
    python -m bench.table --check     # exit status 1 when a page shows something else
    python -m bench.table --write     # into docs/performance.md, and headlines into README.md
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bench.lab import RESULTS
from bench.rows import SOURCES

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"

ROOT = RESULTS.parent.parent

#: What the README shows: beginnings of rows.
HEADLINES = (
    "paced replay, 8,192 tokens in, 32 out, 10gbit link, KV streamed layer by layer",
    "1.07 GB of KV cache over 10gbit",
    "NVIDIA H100, 8,192 tokens:",
    "the relay's own time",
    "200 random faults",
    "a coding agent's 39 calls, 8,723 to 51,632 tokens, paced: KV sent",
)


def table(results: Path, headlines: bool = False) -> str:
    """The markdown: all rows, with a line for each result file that says where and when, or the
    headlines."""
    lines = ["| what | measured | beside it |", "|---|---|---|"]
    notes = []
    for name, rows in SOURCES.items():
        path = results / name
        if not path.exists():
            continue
        result = json.loads(path.read_text())
        lines += [
            f"| {what} | {measured} | {beside} |"
            for what, measured, beside in rows(result)
            if not headlines or what.startswith(HEADLINES)
        ]
        machine = result["machine"]
        where = machine.get("gpu") or f"{machine['cores']} cores of {machine['cpu']}"
        notes.append(
            f"`bench/results/{name}`: {where}, {result['date'][:10]}, `{result['command']}`."
        )
    if headlines:
        return "\n".join(lines) + "\n"
    return "\n".join([*lines, "", *(f"{note}  " for note in notes)]).rstrip() + "\n"


def page_with(text: str, page: str) -> str:
    """The page, with the text between its two marker comments."""
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{text}{END}{after}"


def main() -> int:
    """Print the table, compare it, or put it where the markers are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true", help="into the two pages")
    parser.add_argument("--check", action="store_true", help="whether they are as written")
    options = parser.parse_args()
    if not options.write and not options.check:
        print(table(options.results), end="")
        return 0
    stale = False
    for name, headlines in (("docs/performance.md", False), ("README.md", True)):
        page = (ROOT / name).read_text()
        wanted = page_with(table(options.results, headlines), page)
        if options.write:
            (ROOT / name).write_text(wanted)
        elif page != wanted:
            stale = True
            print(f"{name} is out of date: python -m bench.table --write", file=sys.stderr)
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
