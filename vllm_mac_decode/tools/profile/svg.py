"""Profiles as a picture: two panels, seconds of a prefill and tokens decoded in a second."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Final

from mlx_receiver.wire.profile import Profile
from mlx_receiver.wire.seldom import printable
from vllm_mac_decode.tools.profile.show import decoded
from vllm_mac_decode.tools.profile.sources import Known

#: Colours that stay apart for colour-blind readers.
_COLOURS: Final = {"vllm": "#4a78b0", "receiver": "#b0578d"}
_WIDTH, _HEIGHT, _GAP, _TOP = 380, 260, 80, 70
_SHORTEST, _LONGEST = 64, 65536
_POINTS: Final = 41


def draw(known: Sequence[Known]) -> str:
    """The SVG's text."""
    sides = [(one, one.profile) for one in known if one.profile is not None]
    parts = [
        _panel(0, "Prefill of a prompt, seconds", sides, lambda p, n: p.prefill.seconds(n)),
        _panel(1, "Decoded behind it, tokens/s", sides, decoded),
    ]
    for index, one in enumerate(known):
        device = printable(one.profile.device) if one.profile else "not known"
        text = escape(f"{one.title}: {device}")
        parts.append(
            f'<text x="{_GAP}" y="{20 + 16 * index}" fill="{_COLOURS[one.side]}" '
            f'font-weight="bold">{text}</text>'
        )
    width, height = 2 * (_WIDTH + _GAP) + 20, _HEIGHT + _TOP + 50
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="12">\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _panel(
    index: int,
    title: str,
    sides: Sequence[tuple[Known, Profile]],
    value: Callable[[Profile, int], float],
) -> str:
    left, bottom = _GAP + index * (_WIDTH + _GAP), _TOP + _HEIGHT
    ratio = (_LONGEST / _SHORTEST) ** (1 / (_POINTS - 1))
    lengths = [round(_SHORTEST * ratio**n) for n in range(_POINTS)]
    curves = [(one, [value(profile, n) for n in lengths]) for one, profile in sides]
    values = [v for _, curve in curves for v in curve if v > 0]
    low = math.floor(math.log10(min(values, default=0.1)))
    high = max(low + 1, math.ceil(math.log10(max(values, default=1.0))))

    def x(tokens: float) -> float:
        return left + _WIDTH * math.log(tokens / _SHORTEST) / math.log(_LONGEST / _SHORTEST)

    def y(amount: float) -> float:
        return bottom - _HEIGHT * (math.log10(amount) - low) / (high - low)

    parts = [f'<text x="{left}" y="{_TOP - 8}" fill="#333">{escape(title)}</text>']
    for power in range(low, high + 1):
        at = y(10.0**power)
        parts.append(
            f'<path d="M{left} {at:.1f}h{_WIDTH}" stroke="#e4e4e4"/><text x="{left - 6}" '
            f'y="{at + 4:.1f}" text-anchor="end" fill="#333">{10.0**power:g}</text>'
        )
    for tokens in (64, 512, 4096, 32768):
        parts.append(
            f'<text x="{x(tokens):.1f}" y="{bottom + 16}" text-anchor="middle" '
            f'fill="#333">{tokens:,}</text>'
        )
    parts.append(
        f'<text x="{left + _WIDTH / 2}" y="{bottom + 34}" text-anchor="middle" '
        'fill="#333">tokens of the prompt</text>'
    )
    for one, curve in curves:
        points = " ".join(
            f"{x(n):.1f},{y(v):.1f}" for n, v in zip(lengths, curve, strict=True) if v > 0
        )
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{_COLOURS[one.side]}" '
            'stroke-width="2"/>'
        )
    return "\n".join(parts)
