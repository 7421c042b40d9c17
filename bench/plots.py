"""Pictures of the results in ``bench/results``: one SVG and one PNG each.

    python -m bench.plots                          # every result that exists
    python -m bench.plots --results DIR --out DIR

Needs matplotlib (extra ``demo``).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.lab import RESULTS, fastest_first

PREFILL, TRANSFER, DECODE, PALE = "#4269d0", "#efb118", "#3ca951", "#c9ccd3"
LIMIT = "#ff725c"

Picture = Callable[[dict[str, Any]], Figure]


def transports(result: dict[str, Any]) -> Figure:
    """GB/s of every transport, one panel a link, with what limits it."""
    links = result["links"]
    figure, axes = plt.subplots(
        1, len(links), figsize=(5.2 * len(links), 3.4), squeeze=False, layout="constrained"
    )
    for axis, (link, rows) in zip(axes[0], links.items(), strict=True):
        names = ["plain sockets" if r["transport"] == "sockets" else r["transport"] for r in rows]
        rates = [row["gb_per_s"] for row in rows]
        colours = [PALE if row["transport"] == "sockets" else PREFILL for row in rows]
        bars = axis.barh(names, rates, color=colours)
        labels = [f"{r['gb_per_s']:.2f}  ({r['cpu_s_per_gb_both']:.2f} CPU-s/GB)" for r in rows]
        axis.bar_label(bars, labels, padding=4, fontsize=9)
        limit = result["floors"]["memcpy_gb_per_s"]
        text = f"one thread's memcpy: {limit:.1f}"
        if link != "loopback":
            limit = result["floors"]["link_10gbit_gb_per_s"]
            axis.axvline(limit, color=LIMIT, linewidth=1.5)
            text = f"the link: {limit:.2f}"
        axis.set_xlim(0, max([*rates, limit if link != "loopback" else 0]) * 1.75)
        axis.invert_yaxis()
        axis.set_title(f"{link} (limit: {text} GB/s)", fontsize=10)
        axis.set_xlabel("GB/s, from the first frame to finished MLX arrays")
        _bare(axis)
    figure.suptitle(
        f"{result['bytes'] / 1e9:.2f} GB of KV cache into MLX, every byte compared", fontsize=11
    )
    return figure


def replay(result: dict[str, Any]) -> Figure:
    """Prefill, exposed transfer and decode, beside the published figures."""
    published = result["published"]
    bars = [
        ("Mac alone\n(published)", published["mac_prefill"], 0.0, published["mac_decode"]),
        ("Spark alone\n(published)", published["spark_prefill"], 0.0, published["spark_decode"]),
        ("Together\n(published)", published["spark_prefill"], 0.0, published["mac_decode"]),
    ]
    names = {
        "afterwards": "Replay, KV sent\nafter prefill",
        "streamed": "Replay, KV streamed\nlayer by layer",
        "chunked": "Replay, streamed,\nchunked prefill",
    }
    rows = {r["variant"]: r for r in result["rows"] if r["tokens"] == published["tokens"]}
    for variant, name in names.items():
        if variant in rows:
            row = rows[variant]
            bars.append((name, row["prefill_s"], row["exposed_s"], row["decode_s"]))
    figure, axis = plt.subplots(figsize=(8.4, 0.62 * len(bars) + 1.3), layout="constrained")
    left = [0.0] * len(bars)
    labels = [name for name, *_ in bars]
    parts = (("prefill", PREFILL), ("transfer not hidden", TRANSFER), ("decode", DECODE))
    for index, (part, colour) in enumerate(parts):
        widths = [bar[1 + index] for bar in bars]
        axis.barh(labels, widths, left=left, color=colour, label=part)
        left = [at + width for at, width in zip(left, widths, strict=True)]
    for position, total in enumerate(left):
        axis.text(total + 0.06, position, f"{total:.2f} s", va="center", fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(0, max(left) * 1.12)
    axis.set_xlabel("seconds")
    axis.legend(frameon=False, fontsize=9, loc="lower right")
    axis.set_title(
        f"Llama-3.1-8B, {published['tokens']:,} tokens in, {published['output_tokens']} out, "
        f"{result['link']} link",
        fontsize=11,
    )
    _bare(axis)
    return figure


def context(result: dict[str, Any]) -> Figure:
    """Total seconds and exposed transfer over the prompt's length."""
    figure, (total, exposed) = plt.subplots(1, 2, figsize=(9.6, 3.6), layout="constrained")
    styles = {
        "afterwards": (TRANSFER, "KV sent after prefill"),
        "streamed": (PREFILL, "KV streamed layer by layer"),
        "chunked": (DECODE, "streamed, chunked prefill"),
    }
    for variant, (colour, label) in styles.items():
        rows = sorted(
            (r for r in result["rows"] if r["variant"] == variant), key=lambda r: r["tokens"]
        )
        tokens = [row["tokens"] for row in rows]
        style = {"color": colour, "label": label, "marker": "o", "markersize": 4}
        total.plot(tokens, [row["total_s"] for row in rows], **style)
        exposed.plot(tokens, [1e3 * row["exposed_s"] for row in rows], **style)
    rows = sorted({(r["tokens"], r["compute_floor_s"], r["link_floor_s"]) for r in result["rows"]})
    lengths, compute, link = zip(*rows, strict=True)
    total.plot(lengths, compute, color="black", linestyle=":", label="prefill + decode alone")
    exposed.plot(
        lengths, [1e3 * s for s in link], color=LIMIT, linestyle=":", label="the link, all bytes"
    )
    total.set_ylabel("seconds, request to last token")
    exposed.set_ylabel("ms between prefill and a finished cache")
    exposed.set_yscale("log")
    for axis in (total, exposed):
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [f"{n // 1024}k" for n in lengths])
        axis.set_xlabel("prompt tokens")
        axis.legend(frameon=False, fontsize=8)
        _bare(axis, grid="y")
    return figure


def overlap(result: dict[str, Any]) -> Figure:
    """On a GPU: the first token with the export on and off, and the receiver's first behind it."""
    rows = sorted(result["rows"], key=lambda row: (row["step_tokens"] or 0, row["prompt_tokens"]))
    chosen = [row for row in rows if row["streams"] == "auto"]
    single = {(r["prompt_tokens"], r["step_tokens"]): r for r in rows if r["streams"] == "1"}
    whole = [row for row in chosen if row["step_tokens"] is None]
    figure, (first, gap) = plt.subplots(1, 2, figsize=(10.4, 3.6), layout="constrained")
    kinds = (
        ("first_token_local_ms", "kept local", PALE),
        ("first_token_handed_off_ms", "KV streamed out", PREFILL),
    )
    for index, (key, label, colour) in enumerate(kinds):
        middle = [row[key]["median"] for row in whole]
        places = [at + 0.38 * (index - 0.5) for at in range(len(whole))]
        bars = first.bar(places, middle, 0.36, color=colour, label=label)
        first.bar_label(bars, [f"{value:.0f}" for value in middle], fontsize=8)
    ticks = [f"{r['prompt_tokens'] // 1024}k\n({r['slowdown_percent']:+.1f}%)" for r in whole]
    first.set_xticks(range(len(whole)), ticks)
    first.set_xlabel("prompt tokens (change of the median)")
    first.set_ylabel("ms to the first token")
    first.set_yscale("log")
    first.legend(frameon=False, fontsize=8)
    for at, row in enumerate(chosen):
        other = single.get((row["prompt_tokens"], row["step_tokens"]))
        for shown, place, colour in ((other, at - 0.19, PALE), (row, at + 0.19, DECODE)):
            if shown is None:
                continue
            middle, high = shown["handoff_gap_ms"]["median"], shown["handoff_gap_ms"]["p90"]
            bars = gap.bar(
                place, middle, 0.36, color=colour,
                yerr=[[0.0], [high - middle]], capsize=3, ecolor="#555555",
            )  # fmt: skip
            gap.bar_label(bars, [f"{middle:.0f}"], label_type="center", fontsize=8)
    gap.bar(0, 0, color=PALE, label="one connection")
    gap.bar(0, 0, color=DECODE, label="connections chosen by itself")
    names = [
        f"{r['prompt_tokens'] // 1024}k" + ("\n(2k steps)" if r["step_tokens"] else "")
        for r in chosen
    ]
    gap.set_xticks(range(len(chosen)), names)
    gap.set_xlabel("prompt tokens")
    gap.set_ylabel("ms of hand-off gap beyond a decode\nstep: median, and p90 as a line")
    gap.legend(frameon=False, fontsize=8)
    for axis in (first, gap):
        _bare(axis, grid="y")
    figure.suptitle(f"{result['machine']['gpu']}, Llama-3.1-8B's shape", fontsize=11)
    return figure


def agent(result: dict[str, Any]) -> Figure:
    """Seconds to the second token of an agent's calls, over their history and over what is new."""
    runs = result["runs"]
    links = fastest_first(run["link"] for run in runs)
    figure, axes = plt.subplots(
        2, len(links), figsize=(5.2 * len(links), 6.4), squeeze=False, layout="constrained"
    )
    for column, link in enumerate(links):
        kept, sent = (
            next(r["rows"][1:] for r in runs if (r["link"], r["keeps"]) == (link, keeps))
            for keeps in (True, False)
        )
        marks: list[tuple[str, list[dict[str, Any]], str, dict[str, Any]]] = [
            ("Mac alone, own prompt cache (computed)", kept, "mac_alone_second_s",
             {"color": LIMIT, "marker": "_"}),
            ("vLLM alone (computed)", kept, "vllm_alone_second_s",
             {"color": "#9a9a9a", "marker": "_"}),
            ("whole history sent", sent, "second_s", {"color": TRANSFER, "marker": "o"}),
            ("kept, continued in place", [r for r in kept if r["in_place"]], "second_s",
             {"color": PREFILL, "marker": "o"}),
            ("kept, copied first (by this CPU)", [r for r in kept if not r["in_place"]],
             "second_s", {"edgecolors": PREFILL, "facecolors": "none", "marker": "o"}),
        ]  # fmt: skip
        for row, (key, label) in enumerate(
            (("prompt_tokens", "tokens of the prompt"), ("new_tokens", "tokens of it that are new"))
        ):
            axis = axes[row][column]
            for name, rows, value, style in marks:
                axis.scatter(
                    [r[key] for r in rows], [r[value] for r in rows], s=18, label=name, **style
                )
            axis.set_yscale("log")
            axis.set_xlabel(label)
            axis.set_ylabel("seconds to the second token")
            _bare(axis, grid="y")
        axes[0][column].set_title(f"{link} link", fontsize=10)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(
        "A coding agent's calls, Llama-3.1-8B's shape, engines paced as published", fontsize=11
    )
    return figure


def adapt(result: dict[str, Any]) -> Figure:
    """Mean completion times by stage for each choice, and each request of auto's."""
    rows, names = result["rows"], list(result["requests"])
    colours = {"vllm": LIMIT, "split": PREFILL, "mac": TRANSFER, "meet": DECODE}
    of = {"never": "vllm", "always": "split", "mac": "mac", "meet": "meet"}
    figure, (means, each) = plt.subplots(2, 1, figsize=(10.5, 6.4), layout="constrained")
    width = 0.84 / len(names)
    for index, name in enumerate(names):
        places = [at + width * (index - (len(names) - 1) / 2) for at in range(len(rows))]
        label = "auto" if name == "auto" else f'offload = "{name}"'
        colour = "#3b3b3b" if name == "auto" else colours[of[name]]
        values = [row["mean_s"][name] for row in rows]
        bars = means.bar(places, values, 0.92 * width, color=colour, label=label)
        means.bar_label(bars, [f"{value:.1f}" for value in values], fontsize=7)
    means.set_xticks(range(len(rows)), [row["stage"] for row in rows])
    means.set_ylabel("seconds to the last token, mean")
    means.set_ylim(top=1.2 * max(value for row in rows for value in row["mean_s"].values()))
    means.legend(frameon=False, fontsize=8, ncols=len(names))
    _bare(means, grid="y")
    number = 0
    for stage, requests in result["requests"]["auto"].items():
        each.axvline(number - 0.5, color="#c9ccd3", linewidth=1)
        each.text(number - 0.3, 1.02, stage, transform=each.get_xaxis_transform(), fontsize=8)
        for request in requests:
            each.scatter(number, request["seconds"], s=22, color=colours[request["strategy"]])
            number += 1
    for strategy, colour in colours.items():
        each.scatter([], [], s=22, color=colour, label=f"auto chose {strategy}")
    each.set_xlabel("request")
    each.set_ylabel("seconds to the last token")
    each.set_ylim(0, 1.2 * each.get_ylim()[1])
    each.legend(frameon=False, fontsize=8, ncols=4)
    _bare(each, grid="y")
    figure.suptitle(
        f"Conditions change, nobody is told: {result['prompt_tokens']:,} tokens in, "
        f"{result['output_tokens']} out, paced engines, real link and planner",
        fontsize=11,
    )
    return figure


def meet(result: dict[str, Any]) -> Figure:
    """Seconds to a complete cache over the prompt's length, beside the ideal."""
    figure, (total, apart) = plt.subplots(1, 2, figsize=(9.6, 3.8), layout="constrained")
    rows = sorted(result["rows"], key=lambda row: row["tokens"])
    tokens = [row["tokens"] for row in rows]
    lines = [
        ("stream_s", TRANSFER, "-", "all KV sent"),
        ("compute_s", DECODE, "-", "all KV computed by the receiver"),
        ("both_s", PREFILL, "-", "sent from the end, computed from the front"),
        ("ideal_s", "black", ":", "the ideal, 1 / (1 / sent + 1 / computed)"),
    ]
    for key, colour, style, label in lines:
        seconds = [row[key] for row in rows]
        marker = "" if style == ":" else "o"
        total.plot(
            tokens, seconds, color=colour, linestyle=style, label=label, marker=marker, markersize=4
        )
    beside = [
        ("ideal_s", PREFILL, "of what was measured"),
        ("floor_s", PALE, "of the published and the link's rate"),
    ]
    for index, (key, colour, label) in enumerate(beside):
        above = [100 * (row["both_s"] / row[key] - 1) for row in rows]
        places = [at + 0.36 * (index - 0.5) for at in range(len(rows))]
        apart.bar(places, above, color=colour, width=0.34, label=label)
    apart.axhline(15, color=LIMIT, linewidth=1.2)
    apart.set_xticks(range(len(rows)), [f"{n // 1024}k" for n in tokens])
    apart.set_ylabel("% above the ideal")
    apart.legend(frameon=False, fontsize=9, loc="lower left")
    total.set_xscale("log", base=2)
    total.set_yscale("log")
    total.set_xticks(tokens, [f"{n // 1024}k" for n in tokens])
    total.set_ylabel("seconds to a complete cache")
    for axis in (total, apart):
        axis.set_xlabel("tokens of the prompt")
        _bare(axis, grid="y")
    figure.legend(*total.get_legend_handles_labels(), loc="outside lower center", ncols=2,
                  frameon=False, fontsize=9)  # fmt: skip
    figure.suptitle(
        f"Llama-3.1-8B's shape, {result['link']} link, engines paced as published", fontsize=11
    )
    return figure


def _bare(axis: Axes, grid: str = "x") -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis=grid, color="#e6e6e6", linewidth=0.8)
    axis.set_axisbelow(True)


#: Name of the picture: the result that it draws, and how.
PICTURES: dict[str, tuple[str, Picture]] = {
    "transports": ("transport.json", transports),
    "replay": ("replay.json", replay),
    "context": ("replay.json", context),
    "overlap_gpu": ("overlap_gpu.json", overlap),
    "agent": ("agent_paced.json", agent),
    "adapt": ("adapt.json", adapt),
    "meet": ("meet.json", meet),
}


def main() -> None:
    """Draw what there is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    # The same result gives the same file.
    plt.rcParams |= {"svg.hashsalt": "vllm-mac-decode", "svg.fonttype": "none"}
    options.out.mkdir(parents=True, exist_ok=True)
    for name, (source, draw) in PICTURES.items():
        path = options.results / source
        if not path.exists():
            print(f"{name}: no {source}")
            continue
        figure = draw(json.loads(path.read_text()))
        figure.savefig(options.out / f"{name}.svg", metadata={"Date": None})
        figure.savefig(options.out / f"{name}.png", dpi=160)
        plt.close(figure)
        print(f"{name}: {name}.svg, {name}.png")


if __name__ == "__main__":
    main()
