"""A plan as an SVG, written without a library that draws."""

from __future__ import annotations

import textwrap
from html import escape

from mlx_receiver.planning.cost import Prediction, Strategy
from mlx_receiver.planning.plan import NAMES, Plan
from vllm_mac_decode.tools.plan.show import LANES, ticks

# Colours that stay apart for colour-blind readers and in grey.
_COLOURS = {"prefill": "#4a78b0", "KV": "#e69f00", "decode": "#009e73"}
_TEXT, _GRID, _CHOSEN = "#333333", "#e6e6e6", "#f3f6fa"

_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 90, 72, 34
_WIDTH, _LANE, _HEAD, _GAP = 820, 18, 20, 12


def svg(plan: Plan) -> str:
    """What vLLM, the link and the Mac do in each strategy, on one axis of seconds."""
    end = max((span.end for p in plan.predictions for span in p.spans), default=0.0) or 1.0
    group = _HEAD + len(LANES) * _LANE + _GAP
    height = _TOP + len(plan.predictions) * group + _BOTTOM
    floor = height - _BOTTOM
    work = plan.situation.work
    title = f"{plan.situation.model}, {work.prompt:,} tokens in, {work.output:,} out: predicted"
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" font-family="sans-serif" font-size="12" '
        f'fill="{_TEXT}">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        _words(12, 20, title, 'font-size="14" font-weight="bold"'),
        *(
            _words(12, 38 + 14 * number, line, 'font-size="11"')
            for number, line in enumerate(textwrap.wrap(plan.why, 130)[:2])
        ),
    ]
    for index, prediction in enumerate(plan.predictions):
        if prediction is plan.chosen:
            top = _TOP + index * group - 4
            drawn.append(
                f'<rect x="6" y="{top}" width="{_WIDTH - 12}" height="{group - 4}" rx="4" '
                f'fill="{_CHOSEN}"/>'
            )
    ways = ", ".join(f"{one.codec.name} {one.total:.2f} s" for one in plan.by_codec)
    for tick in ticks(end, 8):
        x = _at(tick, end)
        drawn.append(f'<path d="M{x:.1f} {_TOP}V{floor}" stroke="{_GRID}"/>')
        drawn.append(_words(x, floor + 16, f"{tick:g} s", 'text-anchor="middle" font-size="11"'))
    for index, prediction in enumerate(plan.predictions):
        bold = prediction is plan.chosen
        drawn += _strategy(prediction, _TOP + index * group, end, bold)
        if prediction.strategy is Strategy.SPLIT and len(plan.by_codec) > 1:
            at, style = _TOP + index * group + 13, 'text-anchor="end" font-size="11"'
            drawn.append(_words(_WIDTH - 12, at, f"by codec: {ways}", style))
    for place, (name, colour) in enumerate(_COLOURS.items()):
        x = _WIDTH - 230 + place * 75
        drawn.append(f'<rect x="{x}" y="10" width="12" height="12" fill="{colour}"/>')
        drawn.append(_words(x + 16, 20, name))
    return "\n".join([*drawn, "</svg>"]) + "\n"


def _strategy(prediction: Prediction, top: float, end: float, bold: bool) -> list[str]:
    name = NAMES[prediction.strategy]
    style = 'font-weight="bold"' if bold else ""
    drawn = [_words(12, top + 13, name, style)]
    for index, (lane, called) in enumerate(LANES.items()):
        y = top + _HEAD + index * _LANE
        drawn.append(_words(_LEFT - 8, y + 12, called, 'text-anchor="end" font-size="11"'))
        for span in prediction.spans:
            if span.lane == lane and span.end > span.begin:
                x, wide = _at(span.begin, end), _at(span.end, end) - _at(span.begin, end)
                drawn.append(
                    f'<rect x="{x:.1f}" y="{y}" width="{max(wide, 0.8):.1f}" height="{_LANE - 4}" '
                    f'fill="{_COLOURS[span.name]}"><title>{escape(span.name)}: {span.begin:.3f} s '
                    f"to {span.end:.3f} s</title></rect>"
                )
    last = _at(max(span.end for span in prediction.spans), end) + 6
    text = f"{prediction.total:.2f} s"
    drawn.append(_words(last, top + _HEAD + 2 * _LANE + 12, text, style))
    return drawn


def _at(seconds: float, end: float) -> float:
    return _LEFT + seconds / end * (_WIDTH - _LEFT - _RIGHT)


def _words(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(text)}</text>'
