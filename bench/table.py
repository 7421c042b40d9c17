"""The tables of measured figures, from the results in ``bench/results``.

python -m bench.table             # print all of it
    python -m bench.table --write     # into docs/performance.md, and headlines into README.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.lab import RESULTS

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"

ROOT = RESULTS.parent.parent

#: What the README shows: beginnings of rows.
HEADLINES = (
    "paced replay, 8,192 tokens in, 32 out, 10gbit link, KV streamed layer by layer",
    "1.07 GB of KV cache over 10gbit",
    "NVIDIA H100, 8,192 tokens:",
    "the relay's own time",
    "200 random faults",
)

Row = tuple[str, str, str]


def transport_rows(result: dict[str, Any]) -> Iterator[Row]:
    """The built-in transport on each link, beside what limits it."""
    size = f"{result['bytes'] / 1e9:.2f} GB"
    for link, rows in result["links"].items():
        at = {row["transport"]: row for row in rows}
        checked = at["tcp+checksum"]
        yield (
            f"{size} of KV cache over {link} into finished MLX arrays",
            f"**{at['tcp']['gb_per_s']:.2f} GB/s**, {at['tcp']['cpu_s_per_gb_both']:.2f} CPU-s/GB "
            f"for both sides; with a checksum of every block {checked['gb_per_s']:.2f} and "
            f"{checked['cpu_s_per_gb_both']:.2f}",
            f"plain sockets {at['sockets']['gb_per_s']:.2f} GB/s; "
            + (
                f"one thread's memcpy {result['floors']['memcpy_gb_per_s']:.1f}"
                if link == "loopback"
                else f"the link {result['floors']['link_10gbit_gb_per_s']:.2f}"
            ),
        )


def replay_rows(result: dict[str, Any]) -> Iterator[Row]:
    """Totals of the paced replay at the published length."""
    names = {
        "streamed": "streamed layer by layer",
        "chunked": f"streamed, {result['chunk']:,}-token prefill steps",
        "afterwards": "sent after prefill",
    }
    published = result["published"]
    for row in result["rows"]:
        if row["tokens"] != published["tokens"]:
            continue
        if row["variant"] == "link-bound":
            yield (
                f"paced replay, {row['tokens']:,} tokens in, prefill in half of the "
                f"{result['link']} link's time: from the first layer to finished MLX arrays",
                f"**{row['transfer_s']:.3f} s**",
                f"bytes / link rate {row['link_floor_s']:.3f} s",
            )
        else:
            yield (
                f"paced replay, {row['tokens']:,} tokens in, {published['output_tokens']} out, "
                f"{result['link']} link, KV {names[row['variant']]}",
                f"**{row['total_s']:.2f} s**, {1e3 * row['exposed_s']:.0f} ms of it transfer "
                "that was not hidden",
                f"computation alone {row['compute_floor_s']:.2f} s; published "
                f"{published['together']:.2f} s",
            )


def handoff_rows(result: dict[str, Any]) -> Iterator[Row]:
    """What the connector costs, and how long the hand-off takes, on a machine's CPU."""
    first = result["first_token_ms"]
    what = f"{result['model']}, fp32, {result['prompt_tokens']:,} tokens, both engines on one CPU"
    yield (
        f"{what}: first token, handed off",
        f"**{first['handed_off']:.0f} ms**",
        f"kept local {first['local']:.0f} ms; a vLLM without the connector {first['plain']:.0f} ms",
    )
    yield (
        f"{what}: cache complete after the last layer",
        f"**{result['cache_complete_after_last_layer_ms']:.0f} ms**",
        f"{result['kv_bytes'] / 1e6:.0f} MB",
    )
    yield (
        f"{what}: vLLM's first token to the receiver's",
        f"**{result['handoff_gap_ms']:.0f} ms**",
        f"a decode step: {result['decode_step_ms']['handed_off']:.0f} ms",
    )


def serving_rows(result: dict[str, Any]) -> Iterator[Row]:
    """What the relay adds to each token."""
    latency, own = result["relay_latency"], result["relay_time"]
    yield (
        "the relay's own time for a decode step, in vLLM's engine process",
        f"**{own['p50_ms']:.2f} ms** p50, {own['p99_ms']:.2f} ms p99",
        f"{own['steps']:,.0f} steps, 1 to 8 requests each",
    )
    for at_once in (1, 8):
        tpot = {
            row["server"]: row["median_tpot_ms"]
            for row in result["rows"]
            if row["concurrency"] == at_once
        }
        yield (
            f"{result['model']}: time per output token (p50), {at_once} at once, handed off",
            f"**{tpot['vLLM and receiver']:.1f} ms**",
            f"the receiver alone {tpot['receiver alone']:.1f}, vLLM alone "
            f"{tpot['vLLM alone']:.1f}; every process on the same cores",
        )
    yield (
        "a token's way from the receiver through vLLM to the HTTP client",
        f"**{latency['p50_ms']:.2f} ms** p50, {latency['p99_ms']:.2f} ms p99",
        f"{latency['samples']} tokens",
    )


def fault_rows(result: dict[str, Any]) -> Iterator[Row]:
    """Responses under faults."""
    kinds = ", ".join(f"{count} x {kind}" for kind, count in sorted(result["actions"].items()))
    yield (
        f"{result['trials']} random faults under load ({kinds})",
        f"**{result['responses_wrong']} wrong or failed** of "
        f"{result['responses_right'] + result['responses_wrong']:,} responses",
        f"{result['fell_back']['all']:.0f} fell back to local decode",
    )


def overlap_rows(result: dict[str, Any]) -> Iterator[Row]:
    """What exporting costs the first token, and what of the transfer comes after it."""
    for row in result["rows"]:
        local, handed = row["first_token_local_ms"], row["first_token_handed_off_ms"]
        gap, lag = row["handoff_gap_ms"], row["cache_complete_after_last_layer_ms"]
        steps = f" in steps of {row['step_tokens']:,}" if row["step_tokens"] else ""
        steps += "" if row["streams"] == "auto" else f", {row['streams']} connection"
        yield (
            f"{_gpu(result)}, {row['prompt_tokens']:,} tokens{steps}: first token with KV streamed "
            "out; hand-off gap beyond a decode step, p50 and p90",
            f"**{handed['median']:.1f} ms** ({row['slowdown_percent']:+.1f} %); "
            f"**{gap['median']:.1f} and {gap['p90']:.1f} ms**",
            f"kept local {local['median']:.1f} ms; cache complete after the last layer "
            f"{lag['median']:.1f} and {lag['p90']:.1f} ms; {row['samples']} hand-offs in "
            f"{len(row['processes'])} processes, whose median gaps were "
            f"{', '.join(f'{ms:.1f}' for ms in row['process_gaps_ms'])}",
        )


def two_gpus_rows(result: dict[str, Any]) -> Iterator[Row]:
    """The gap with the receiver's own decode step in it."""
    for row in result["rows"]:
        if row["prompt_tokens"] == 8192:
            yield (
                f"two {_gpu(result)}, 8,192 tokens, MLX on the second: vLLM's first token to "
                "the receiver's",
                f"**{row['handoff_gap_ms']['median']:.1f} ms**",
                f"a decode step {row['receiver_ms_per_token']['median']:.1f} ms, "
                f"vLLM's own {row['local_ms_per_token']['median']:.1f}",
            )


def relay_rows(result: dict[str, Any]) -> Iterator[Row]:
    """Both engines on one GPU, where they take turns."""
    for row in result["rows"]:
        if row["prompt_tokens"] == 8192:
            yield (
                f"vLLM and MLX on the same {_gpu(result)}, 8,192 tokens: first token; vLLM's first "
                "token to the receiver's; tokens/s",
                f"**{row['first_token_handed_off_ms']['median']:.0f} ms**; "
                f"**{row['handoff_gap_ms']['median']:.0f} ms**; "
                f"**{1e3 / row['receiver_ms_per_token']['median']:.0f}**",
                f"vLLM alone {row['first_token_local_ms']['median']:.0f} ms and "
                f"{1e3 / row['local_ms_per_token']['median']:.0f} tokens/s",
            )


def _gpu(result: dict[str, Any]) -> str:
    return " ".join(result["machine"]["gpu"].split()[:2])


SOURCES = {
    "replay.json": replay_rows,
    "transport.json": transport_rows,
    "overlap_gpu.json": overlap_rows,
    "overlap_two_gpus.json": two_gpus_rows,
    "relay_gpu.json": relay_rows,
    "handoff.json": handoff_rows,
    "serving.json": serving_rows,
    "faults.json": fault_rows,
}


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


def write(page: Path, text: str) -> None:
    """Put the text between the page's two marker comments."""
    before, rest = page.read_text().split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{text}{END}{after}")


def main() -> None:
    """Print the table or put it where the markers are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true", help="into the two pages")
    options = parser.parse_args()
    if not options.write:
        print(table(options.results), end="")
        return
    write(ROOT / "docs" / "performance.md", table(options.results))
    write(ROOT / "README.md", table(options.results, headlines=True))


if __name__ == "__main__":
    main()
