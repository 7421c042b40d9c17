"""The three ways as bars, in an SVG that needs no library to be drawn."""

from __future__ import annotations

from typing import Any
from xml.sax.saxutils import escape

_PREFILL, _DECODE, _TEXT, _PALE, _LINE = "#4269d0", "#3ca951", "#222222", "#6b7280", "#e5e7eb"
_FONT = "-apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

_WIDTH, _LEFT, _RIGHT = 860, 132, 150
_TOP, _BAR, _STEP = 112, 38, 62

_NAMES = {"vllm_alone": "vLLM alone", "mac_alone": "Mac alone", "together": "Together"}


def draw(result: dict[str, Any]) -> str:
    """The SVG of a result of ``run.measure``."""
    ways = result["ways"]
    totals = {way: ways[way]["total_s"] for way in _NAMES}
    scale = (_WIDTH - _LEFT - _RIGHT) / max(total["p90"] for total in totals.values())
    bottom = _TOP + _STEP * len(_NAMES)
    height = bottom + 80
    lengths = f"{result['prompt_tokens']:,} tokens in, {result['output_tokens']} out"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}" font-family="{_FONT}">',
        f'<rect width="{_WIDTH}" height="{height}" rx="10" fill="white"/>',
        _text(28, 42, f"{result['model']}: {lengths}", size=20, weight=600),
        _text(28, 66, _machines(result), size=13, fill=_PALE),
        *_legend(),
        f'<line x1="{_LEFT}" x2="{_LEFT}" y1="{_TOP - 8}" y2="{bottom - 16}" stroke="{_LINE}" '
        'stroke-width="2"/>',
    ]
    for row, (way, name) in enumerate(_NAMES.items()):
        parts += _bar(name, ways[way], _TOP + _STEP * row, scale, way == "together")
    first, *others = _footer(result, totals)
    parts.append(_text(28, bottom + 18, first, size=14, weight=600))
    parts += [
        _text(28, bottom + 40 + 19 * row, line, size=13, fill=_PALE)
        for row, line in enumerate(others)
    ]
    return "\n".join([*parts, "</svg>", ""])


def _bar(name: str, way: dict[str, Any], top: float, scale: float, strong: bool) -> list[str]:
    """Prefill and decode at their medians; the thin line is what nine runs of ten need."""
    total, first = way["total_s"], way["first_token_s"]
    prefill, whole = scale * first["p50"], scale * total["p50"]
    late, middle = scale * total["p90"], top + _BAR / 2
    label = f"{_seconds(total['p50'])} s"
    beside = f"{_seconds(first['p50'])} + {_seconds(total['p50'] - first['p50'])}"
    at = _LEFT + max(late, whole) + 12
    return [
        _text(_LEFT - 14, middle + 5, name, size=15, weight=600 if strong else 400, anchor="end"),
        f'<rect x="{_LEFT}" y="{top}" width="{whole:.1f}" height="{_BAR}" rx="4" '
        f'fill="{_DECODE}"/>',
        f'<path d="M{_LEFT} {top + 4} a4 4 0 0 1 4 -4 H{_LEFT + max(4.0, prefill):.1f} v{_BAR} '
        f'H{_LEFT + 4} a4 4 0 0 1 -4 -4 Z" fill="{_PREFILL}"/>',
        f'<path d="M{_LEFT + whole:.1f} {middle} H{_LEFT + late:.1f} m0 -6 v12" stroke="{_TEXT}" '
        'stroke-width="1.5" fill="none"/>',
        _text(at, middle - 1, label, size=17, weight=700 if strong else 600),
        _text(at, middle + 15, beside, size=12, fill=_PALE),
    ]


def _legend() -> list[str]:
    parts, at = [], float(_LEFT)
    for colour, name in (
        (_PREFILL, "to the first token (prefill)"),
        (_DECODE, "to the last one (decode)"),
    ):
        parts.append(f'<rect x="{at}" y="83" width="11" height="11" rx="2" fill="{colour}"/>')
        parts.append(_text(at + 17, 93, name, size=12, fill=_PALE))
        at += 200
    return parts


def _machines(result: dict[str, Any]) -> str:
    spark = [gpu.partition(",")[0] for gpu in result["vllm"]["hardware"]["gpus"]]
    spark = spark[:1] or [result["vllm"]["hardware"]["cpu"] or "vLLM's machine"]
    receiver = result["receiver"]
    mac = receiver.get("machine") or "the receiver"
    link = result["link"].get("gb_per_s")
    through = f"{link:.2f} GB/s between them" if link else ""
    engines = f"vLLM {result['vllm']['version']}, {receiver.get('engine') or 'MLX'}"
    return "  ·  ".join(filter(None, [f"{spark[0]} + {mac}", engines, through]))


def _footer(result: dict[str, Any], totals: dict[str, dict[str, float]]) -> list[str]:
    together = totals["together"]["p50"]
    times = [totals[way]["p50"] / together for way in ("vllm_alone", "mac_alone")]
    handoff = result["handoff"]
    gap, exposed = handoff["gap_ms"], handoff["exposed_transfer_ms"]
    return [
        f"Together is {times[0]:.2f} times as fast as vLLM alone, {times[1]:.2f} times as fast as "
        "the Mac alone.",
        f"From vLLM's first token to the Mac's {gap['p50']:.0f} ms (p90 {gap['p90']:.0f}); "
        f"{handoff['kv_bytes'] / 1e6:,.0f} MB of KV, {exposed['p50']:.0f} ms of its transfer not "
        "hidden.",
        f"Medians of {result['repeats']} runs; the thin lines reach the ninth decile.",
    ]


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _text(
    x: float, y: float, text: str, *, size: int, weight: int = 400, fill: str = _TEXT,
    anchor: str = "start",
) -> str:  # fmt: skip
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" fill="{fill}" '
        f'text-anchor="{anchor}">{escape(text)}</text>'
    )
