"""The tables of docs/planning.md: what the cost model says of the published demo, and predictions.

    python -m bench.plan           # exit status 1 when the page does not have them
    python -m bench.plan --write

Everything is calculated from ``mlx_receiver/planning/hardware.py``; nothing is measured.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from bench.paced import PUBLISHED, PUBLISHED_TOKENS
from mlx_receiver.planning import topology
from mlx_receiver.planning.cost import Strategy
from mlx_receiver.planning.hardware import DEVICES, LINKS
from mlx_receiver.planning.plan import NAMES, Plan, plan
from mlx_receiver.planning.topology import Side, Topology, Wire

PAGE = Path(__file__).parent.parent / "docs" / "planning.md"

#: The demo's software drops the token that the prefill produces, so that 32 tokens are 32 steps.
STEPS = 32

#: Models that are predicted, and the bits of their weights where they are not the configuration's:
#: GLM-4.5-Air does not fit into a Spark in 16.
MODELS = (
    ("Llama-3.1-8B", None),
    ("gpt-oss-120b", None),
    ("Qwen3.5-35B-A3B", None),
    ("GLM-4.5-Air", 8.0),
)
PROMPTS = (8192, 32_768)
OUTPUT = 256


def demo() -> str:
    """The published figures, and what the constants give."""
    pair = topology.load(topology.DEFAULT).situation("Llama-3.1-8B", PUBLISHED_TOKENS, 1).pair
    found = {
        "spark_prefill": pair.vllm.prefill.seconds(PUBLISHED_TOKENS),
        "spark_decode": pair.vllm.decode.text(PUBLISHED_TOKENS, STEPS),
        "mac_prefill": pair.mac.prefill.seconds(PUBLISHED_TOKENS),
        "mac_decode": pair.mac.decode.text(PUBLISHED_TOKENS, STEPS),
    }
    wholes = {
        "Spark alone": ("spark_prefill", "spark_decode"),
        "Mac alone": ("mac_prefill", "mac_decode"),
        "together, but for the transfer": ("spark_prefill", "mac_decode"),
    }
    rows = [(_words(name), (name,)) for name in found] + list(wholes.items())
    lines = ["| | published | calculated | difference |", "|---|---|---|---|"]
    for name, parts in rows:
        said, made = (sum(each[part] for part in parts) for each in (PUBLISHED, found))
        lines.append(f"| {name} | {said:.2f} s | {made:.2f} s | {100 * (made / said - 1):+.1f} % |")
    return "\n".join(lines)


def _words(name: str) -> str:
    machine, _, phase = name.partition("_")
    return f"{machine.capitalize()}, {'prefill' if phase == 'prefill' else f'{STEPS} tokens'}"


def predicted(link: str) -> Iterator[tuple[str, int, Plan]]:
    """Of each model and prompt."""
    for model, bits in MODELS:
        machines = Topology(Side("spark", bits=bits), Side("m3-ultra", bits=bits), Wire(link))
        for prompt in PROMPTS:
            name = model if bits is None else f"{model}, {bits:g} bits"
            yield name, prompt, plan(machines.situation(model, prompt, OUTPUT))


def predictions() -> str:
    """Seconds to the last token, the fastest in bold."""
    names = " | ".join(NAMES[strategy] for strategy in Strategy)
    lines = [
        f"| link | model | tokens in | {names} | transfer shown, if split |",
        "|---|---|---|" + "---|" * (len(Strategy) + 1),
    ]
    for link in ("10gbe", "1gbe"):
        for model, prompt, made in predicted(link):
            cells = [_cell(made, strategy) for strategy in Strategy]
            split = made.of(Strategy.SPLIT)
            shown = f"{split.shown:.2f} s" if split else "-"
            lines.append(f"| {link} | {model} | {prompt:,} | {' | '.join(cells)} | {shown} |")
    return "\n".join(lines)


def _cell(made: Plan, strategy: Strategy) -> str:
    found = made.of(strategy)
    if found is None:
        return "-"
    text = f"{found.total:.2f} s"
    return f"**{text}**" if found is made.chosen else text


def machines() -> str:
    """Constants and where they come from."""
    lines = [
        "| `device` | TFLOP/s | GB/s | GB | matrices | attention | experts | reads | passes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, one in DEVICES.items():
        shares = (one.matrices, one.attention, one.experts, one.reads, one.passes)
        figures = (one.flops / 1e12, one.bandwidth / 1e9, one.memory / 1e9)
        cells = [f"{each:g}" for each in figures] + [f"{each:.2f}" for each in shares]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    lines.append("")
    lines += [f"- `{name}`: {'; '.join(one.sources)}." for name, one in DEVICES.items()]
    rates = ", ".join(f"`{name}` {link.rate / 1e6:,.0f} MB/s" for name, link in LINKS.items())
    return "\n".join([*lines, "", f"Links: {rates}."])


TABLES = {"machines": machines, "demo": demo, "predictions": predictions}


def page(text: str) -> str:
    """The page with today's tables."""
    for name, made in TABLES.items():
        begin, end = (f"<!-- {name}: {edge} -->\n" for edge in ("begin", "end"))
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        text = f"{head}{begin}{made()}\n{end}{tail}"
    return text


def main() -> int:
    """Compare, or write."""
    text = PAGE.read_text()
    wanted = page(text)
    if "--write" in sys.argv:
        PAGE.write_text(wanted)
    elif text != wanted:
        print(f"{PAGE.name} does not have today's tables: python -m bench.plan --write")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
