"""A hand-off drawn in the terminal: one row per layer, time from left to right."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.text import Text

from vllm_mac_decode.tools.timeline import Handoff

_LABEL = 11
_STYLES = {"▒": "blue", "─": "yellow", "━": "green", "●": "bold green", "█": "bold blue"}


class Canvas:
    """The time axis of one picture, ``width`` characters from 0 to ``end`` nanoseconds."""

    def __init__(self, end: int, width: int) -> None:
        self._end = max(end, 1)
        self._width = width

    def column(self, moment: int) -> int:
        """The character in which a moment falls."""
        return min(self._width - 1, max(0, moment * self._width // self._end))

    def row(
        self, strokes: Iterable[tuple[str, int, int]], marks: Iterable[tuple[str, int]] = ()
    ) -> str:
        """Characters of one row; later strokes cover earlier ones, marks cover only blanks."""
        cells = [" "] * self._width
        for character, start, end in strokes:
            for column in range(self.column(start), self.column(end) + 1):
                cells[column] = character
        for character, moment in marks:
            if cells[self.column(moment)] == " ":
                cells[self.column(moment)] = character
        return "".join(cells)

    def axis(self) -> str:
        """A scale in milliseconds with a label at every round step."""
        step = _round_step(self._end / 1e6 / max(1, self._width // 12))
        cells = [" "] * (self._width + 10)
        tick = 0.0
        while tick * 1e6 < self._end:
            label = f"╵{tick:g}"
            at = self.column(int(tick * 1e6))
            cells[at : at + len(label)] = label
            tick += step
        return "".join(cells).rstrip() + " ms"


def render(handoff: Handoff, width: int = 100) -> RenderableType:
    """The picture and its legend, at most ``width`` characters wide."""
    first, remote = handoff.first_token_ns, handoff.first_decoded_ns
    end = max(m for m in (handoff.last_committed_ns, first, remote) if m is not None)
    canvas = Canvas(end, max(20, width - _LABEL - 4))
    marks = [("┊", moment) for moment in (first, remote) if moment is not None]
    lines = [_line("prefill", canvas.row([("█", 0, first or handoff.last_computed_ns)], marks))]
    for layer in handoff.layers:
        blocks = [block for block in handoff.blocks if block.layer == layer]
        strokes = [
            ("▒", interval.start, interval.end)
            for interval in handoff.computed
            if interval.layer == layer
        ]
        strokes += [("─", block.computed_ns, block.sent_ns) for block in blocks]
        strokes += [("━", block.sent_ns, block.committed_ns) for block in blocks]
        resident = handoff.resident[layer]
        strokes.append(("●", resident, resident))
        lines.append(_line(f"layer {layer}", canvas.row(strokes, marks)))
    lines.append(_line("", canvas.axis(), "dim"))
    for name, moment in (("first token (vLLM)", first), ("first remote token (MLX)", remote)):
        if moment is not None:
            lines.append(_pointer(canvas, name, moment))
    lines.append(
        Text.assemble(
            " " * _LABEL,
            *_legend("▒", "compute  "),
            *_legend("─", "gather, queue  "),
            *_legend("━", "send  "),
            *_legend("●", "resident"),
        )
    )
    return Group(*lines)


def _line(label: str, cells: str, style: str = "") -> Text:
    text = Text(f"{label:>{_LABEL - 1}} ", style="dim", no_wrap=True)
    for character in cells:
        text.append(character, style or _STYLES.get(character, "magenta"))
    return text


def _pointer(canvas: Canvas, name: str, moment: int) -> Text:
    """A line that points up at a moment, with its text on the side where there is room."""
    column = canvas.column(moment)
    label = f"{name} at {moment / 1e6:,.0f} ms"
    if len(label) + 2 <= column:
        return Text(" " * (_LABEL + column - len(label) - 1) + f"{label} ┘", style="magenta")
    return Text(" " * (_LABEL + column) + f"└ {label}", style="magenta")


def _legend(character: str, meaning: str) -> list[tuple[str, str]]:
    return [(character * 2 + " ", _STYLES[character]), (meaning, "dim")]


def _round_step(least: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is at least ``least``."""
    power = 1e-3
    while True:
        for factor in (1, 2, 5):
            if factor * power >= least:
                return factor * power
        power *= 10
