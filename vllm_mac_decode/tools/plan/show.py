"""A plan in the terminal: a table, a sentence, and what each machine does when."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mlx_receiver.planning.cost import Prediction, Span, Strategy
from mlx_receiver.planning.plan import NAMES, Plan

#: A lane of the picture, as it is called.
LANES = {"vllm": "vLLM", "link": "link", "mac": "Mac"}

_STROKES = {"prefill": ("█", "blue"), "KV": ("━", "yellow"), "decode": ("▒", "green")}
_LABEL = 8


def render(plan: Plan, said: str, width: int) -> RenderableType:
    """Everything, at most ``width`` characters wide."""
    lines: list[RenderableType] = [table(plan), Text.from_markup(f"[bold]{escape(plan.why)}[/]")]
    if len(plan.by_codec) > 1:
        lines += ["", codec_table(plan), ""]
    lines += [Text(f"! {note}", style="yellow") for note in plan.situation.notes]
    if not plan.situation.meets:
        lines.append(
            Text(
                "Meeting in the middle is not possible: this model keeps more than K and V of "
                "every token.",
                style="dim",
            )
        )
    return Group(*lines, Text(said, style="dim"), "", *picture(plan, width))


def table(plan: Plan) -> Table:
    """One row for each strategy, the chosen one in bold."""
    work = plan.situation.work
    title = f"{plan.situation.model}: {work.prompt:,} tokens in, {work.output:,} out"
    found = Table(title=escape(title), title_justify="left")
    for heading in ("", "first token", "second", "last", "transfer shown", "KV sent"):
        found.add_column(heading, justify="right" if heading else "left")
    for prediction in plan.predictions:
        chosen = prediction is plan.chosen
        found.add_row(*cells(prediction), style="bold" if chosen else "")
    return found


def cells(prediction: Prediction) -> tuple[str, ...]:
    """One strategy's figures."""
    sent = prediction.kv_bytes > 0
    times = (prediction.first_token, prediction.second_token, prediction.total)
    return (
        NAMES[prediction.strategy],
        *(f"{seconds:.2f} s" for seconds in times),
        f"{prediction.shown:.2f} s" if sent else "-",
        f"{prediction.kv_bytes / 1e9:.2f} GB" if sent else "-",
    )


def codec_table(plan: Plan) -> Table:
    """One row for each codec that KV could travel in if the work is split, the one that it is
    planned with in bold."""
    split = plan.of(Strategy.SPLIT)
    found = Table(title=f"{NAMES[Strategy.SPLIT]}, by codec", title_justify="left")
    for heading in ("", "second", "last", "transfer shown", "KV sent", "encoded", "decoded"):
        found.add_column(heading, justify="right" if heading else "left")
    for one in plan.by_codec:
        used = split is not None and one.codec.name == split.codec.name
        _, _, second, last, shown, sent = cells(one)
        rates = [
            f"{rate / 1e9:,.2f} GB/s" if math.isfinite(rate) else "-"
            for rate in (one.codec.encode, one.codec.decode)
        ]
        found.add_row(
            one.codec.name, second, last, shown, sent, *rates, style="bold" if used else ""
        )
    return found


def picture(plan: Plan, width: int) -> list[Text]:
    """Of each strategy what vLLM, the link and the Mac do, on one axis of seconds."""
    end = max((span.end for p in plan.predictions for span in p.spans), default=0.0) or 1.0
    columns = max(20, width - _LABEL - 4)
    lines = []
    for prediction in plan.predictions:
        lines.append(Text(NAMES[prediction.strategy], style="bold"))
        for lane, name in LANES.items():
            spans = [span for span in prediction.spans if span.lane == lane]
            if spans:
                lines.append(_line(name, spans, end, columns))
    lines.append(_axis(end, columns))
    legend = Text(" " * _LABEL)
    for name, (stroke, style) in _STROKES.items():
        legend.append(f"{stroke * 2} ", style).append(f"{name}  ", "dim")
    return [*lines, legend]


def _line(name: str, spans: list[Span], end: float, columns: int) -> Text:
    marks: list[tuple[str, str]] = [(" ", "")] * columns
    for span in spans:
        first, last = (min(columns - 1, int(at / end * columns)) for at in (span.begin, span.end))
        for column in range(first, max(first, last - 1) + 1):
            marks[column] = _STROKES[span.name]
    text = Text(f"{name:>{_LABEL - 1}} ", style="dim", no_wrap=True)
    for stroke, style in marks:
        text.append(stroke, style)
    return text


def _axis(end: float, columns: int) -> Text:
    cells = [" "] * (columns + _LABEL)
    for tick in ticks(end, columns // 12):
        label = f"╵{tick:g}"
        at = min(columns - 1, int(tick / end * columns))
        cells[at : at + len(label)] = label
    return Text(" " * _LABEL + "".join(cells).rstrip() + " s", style="dim", no_wrap=True)


def ticks(end: float, most: int) -> list[float]:
    """Round times from 0 to ``end``, not more than ``most`` apart from the first."""
    step = 1e-3
    while end / step > max(1, most):
        step *= 2.5 if f"{step:e}".startswith("2") else 2
    return [count * step for count in range(int(end / step) + 1)]


def as_json(plan: Plan, said: str) -> dict[str, Any]:
    """Everything, for other programs."""
    import msgspec

    situation = plan.situation
    pair, work, load = situation.pair, situation.work, situation.load
    return {
        "model": situation.model,
        "prompt_tokens": work.prompt,
        "output_tokens": work.output,
        "cached_tokens": work.cached,
        "held_tokens": work.held,
        "source": said,
        "notes": list(situation.notes),
        "vllm": msgspec.to_builtins(pair.vllm),
        "mac": msgspec.to_builtins(pair.mac),
        "link": {"bytes_per_s": pair.link.rate, "round_trip_s": pair.link.round_trip},
        "load": msgspec.to_builtins(load),
        "chosen": plan.chosen.strategy.value,
        "why": plan.why,
        "strategies": {
            one.strategy.value: _figures(one)
            | {
                "codec": one.codec.name,
                "met_tokens": one.met,
                "spans": [
                    {"lane": s.lane, "name": s.name, "begin_s": s.begin, "end_s": s.end}
                    for s in one.spans
                ],
            }
            for one in plan.predictions
        },
        "split_by_codec": {
            one.codec.name: _figures(one)
            | {
                "bytes_of_raw": one.codec.ratio,
                "encode_bytes_per_s": _finite(one.codec.encode),
                "decode_bytes_per_s": _finite(one.codec.decode),
            }
            for one in plan.by_codec
        },
    }


def _figures(one: Prediction) -> dict[str, Any]:
    return {
        "first_token_s": one.first_token,
        "second_token_s": one.second_token,
        "total_s": one.total,
        "transfer_shown_s": one.shown,
        "kv_bytes": one.kv_bytes,
    }


def _finite(rate: float) -> float | None:
    return rate if math.isfinite(rate) else None
