"""What sharing the work is worth: seconds to the last token over the prompt's length, predicted.

    python -m bench.worth          # bench/results/worth.json and worth.svg

For the published demo's machines and model, 256 tokens out, over 10 and 1 Gbit Ethernet: each of
the four strategies for every prompt, and the one that the cost model chooses for each. All of it is
calculated (docs/planning.md); the picture needs matplotlib (extra ``demo``).
"""

from __future__ import annotations

import json
from typing import Any

from bench.lab import RESULTS
from mlx_receiver.planning import topology
from mlx_receiver.planning.cost import Strategy
from mlx_receiver.planning.plan import NAMES, plan

MODEL, OUTPUT = "Llama-3.1-8B", 256
LINKS = {"10gbe": "10 Gbit/s", "1gbe": "1 Gbit/s"}
PROMPTS = [round(512 * 2 ** (step / 4)) for step in range(29)]

_COLOURS = {
    Strategy.VLLM: "#4269d0", Strategy.SPLIT: "#efb118", Strategy.MAC: "#3ca951",
    Strategy.MEET: "#ff725c",
}  # fmt: skip


def result() -> dict[str, Any]:
    """For each link and prompt the seconds of each strategy, and which one is chosen."""
    rows = []
    for link in LINKS:
        machines = topology.load(f"spark+m3-ultra@{link}")
        for prompt in PROMPTS:
            made = plan(machines.situation(MODEL, prompt, OUTPUT))
            rows.append(
                {
                    "link": link,
                    "prompt_tokens": prompt,
                    "total_s": {
                        one.strategy.value: round(one.total, 4) for one in made.predictions
                    },
                    "auto": made.chosen.strategy.value,
                }
            )
    return {"model": MODEL, "output_tokens": OUTPUT, "source": "predicted", "rows": rows}


def draw(found: dict[str, Any]) -> Any:
    """One panel a link."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    axes = figure.subplots(1, len(LINKS), sharey=True)
    for axis, (link, title) in zip(axes, LINKS.items(), strict=True):
        rows = [row for row in found["rows"] if row["link"] == link]
        lengths = [row["prompt_tokens"] for row in rows]
        chosen = [row["total_s"][row["auto"]] for row in rows]
        axis.plot(lengths, chosen, color="#c9ccd3", linewidth=9, label="auto: what is chosen")
        for strategy, colour in _COLOURS.items():
            seconds = [row["total_s"][strategy.value] for row in rows]
            style = "--" if strategy is Strategy.MEET else "-"  # it may hide behind another
            axis.plot(lengths, seconds, style, color=colour, label=NAMES[strategy])
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        ticks = [512 << doubled for doubled in range(8)]
        axis.set_xticks(ticks, ["512", *(f"{tick // 1024}k" for tick in ticks[1:])])
        times = [5, 10, 20, 50, 100]
        axis.set_yticks(times, [str(time) for time in times])
        axis.minorticks_off()
        axis.set_xlabel("prompt tokens")
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#e6e6e6", linewidth=0.8)
    axes[0].set_ylabel("seconds to the last token")
    axes[0].legend(frameon=False, fontsize=9)
    figure.suptitle(
        f"Predicted, not measured: {MODEL}, {OUTPUT} tokens out, DGX Spark and M3 Ultra",
        fontsize=11,
    )
    return figure


def main() -> None:
    """Calculate and draw."""
    import matplotlib as mpl

    found = result()
    (RESULTS / "worth.json").write_text(json.dumps(found, indent=1) + "\n")
    # The same result gives the same file.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vllm-mac-decode"}):
        draw(found).savefig(RESULTS / "worth.svg", metadata={"Date": None})
    print("worth.json, worth.svg")


if __name__ == "__main__":
    main()
