"""A hand-off as a picture: what the overlap hid behind the prefill, and what it did not.

One row per layer, the first on top. Needs matplotlib.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_mac_decode.tools.timeline import Handoff, Interval

# Colours that stay apart for colour-blind readers and in grey.
_COMPUTE, _GATHER, _SEND, _RESIDENT = "#9fb8d8", "#e69f00", "#009e73", "#14394f"
_PREFILL, _DECODE, _EXPOSED, _TEXT = "#4a78b0", "#b0578d", "#d55e00", "#333333"

_ROW_INCHES = 0.2


def draw(handoff: Handoff, path: Path) -> Path:
    """Write the picture in the format that the suffix of ``path`` names: .png, .svg, .pdf."""
    import matplotlib as mpl

    # Text stays text in an SVG, and a picture of the same times is the same file.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": handoff.request_id}):
        figure = _figure(handoff)
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path


def _figure(handoff: Handoff) -> Any:
    from matplotlib.figure import Figure

    height = 1.75 + (len(handoff.layers) + 5) * _ROW_INCHES
    figure = Figure(figsize=(11, height), layout="constrained")
    axes = figure.add_subplot()
    end = _end(handoff)
    _shade(axes, handoff)
    _draw_summary(axes, handoff, end)
    _draw_layers(axes, handoff)
    _draw_milestones(axes, handoff)
    axes.set_xlim(_begin(handoff), end)
    axes.set_ylim(_row(handoff, handoff.layers[-1]) + 0.8, -5.1)
    axes.set_xlabel("milliseconds since the session was opened", fontsize=8, color=_TEXT)
    labelled = handoff.layers[:: max(1, len(handoff.layers) // 40)]
    axes.set_yticks([-3, -2, -1, *(_row(handoff, layer) for layer in labelled)])
    axes.set_yticklabels(
        ["vLLM prefill", "KV transfer", "MLX decode", *(f"layer {layer}" for layer in labelled)]
    )
    axes.tick_params(axis="y", length=0)
    axes.tick_params(labelsize=8, colors=_TEXT)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.suptitle(headline(handoff), x=0.008, ha="left", fontsize=12, weight="bold", color=_TEXT)
    figure.text(0.008, 1 - 0.42 / height, caption(handoff), fontsize=9, color=_TEXT)
    axes.set_title(" ", fontsize=11)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def headline(handoff: Handoff) -> str:
    """The hand-off in one line."""
    size = f"{handoff.kv_bytes / 2**20:.1f} MiB of KV"
    return f"{handoff.prompt_tokens} prompt tokens, {len(handoff.layers)} layers, {size}"


def caption(handoff: Handoff) -> str:
    """What the overlap hid, in one line."""
    figures = handoff.figures
    if figures.prefill_ms is None or figures.hidden_share is None or figures.exposed_ms is None:
        return "The request ended before its first token."
    text = (
        f"first token after {figures.prefill_ms:,.0f} ms; "
        f"{figures.hidden_share:.1%} of KV resident by then; "
        f"{figures.exposed_ms:,.1f} ms exposed"
    )
    if figures.handoff_gap_ms is not None:
        text += f"; hand-off gap {figures.handoff_gap_ms:,.1f} ms"
    return text


def _end(handoff: Handoff) -> float:
    """Where the axis ends: a little after the first remote token, not the end of the answer."""
    moments = (handoff.last_committed_ns, handoff.first_token_ns, handoff.first_decoded_ns)
    return max(_ms(moment) for moment in moments if moment is not None) * 1.03


def _shade(axes: Any, handoff: Handoff) -> None:
    """After the last layer's K and V nothing but the end of the forward pass hides a transfer."""
    last, first = handoff.last_computed_ns, handoff.first_token_ns
    until = max(handoff.last_committed_ns, first or 0)
    axes.axvspan(
        _ms(last), _ms(until), color=_EXPOSED, alpha=0.08, linewidth=0,
        label="after the last layer's K and V",
    )  # fmt: skip
    if first is not None and handoff.last_committed_ns > first:
        axes.axvspan(
            _ms(first), _ms(handoff.last_committed_ns), color=_EXPOSED, alpha=0.3, linewidth=0,
            label="exposed: KV under way after the first token",
        )  # fmt: skip


def _draw_summary(axes: Any, handoff: Handoff, end: float) -> None:
    """Three rows for the request as a whole; pale is waiting, full is work."""
    prefill_end = handoff.first_token_ns or handoff.last_computed_ns
    sent = min(block.sent_ns for block in handoff.blocks)
    _bar(axes, -3, _begin(handoff), _ms(prefill_end), _PREFILL)
    _bar(axes, -2, _ms(sent), _ms(handoff.last_committed_ns), _SEND, pale=True)
    for interval in _wire(handoff):
        _bar(axes, -2, _ms(interval.start), _ms(interval.end), _SEND)
    if handoff.first_token_ns is not None and handoff.first_decoded_ns is not None:
        ready = max(handoff.first_token_ns, handoff.last_committed_ns)
        _bar(axes, -1, _ms(ready), _ms(handoff.first_decoded_ns), _DECODE, pale=True)
        _bar(axes, -1, _ms(handoff.first_decoded_ns), end, _DECODE)


def _bar(axes: Any, row: int, start: float, end: float, colour: str, pale: bool = False) -> None:
    alpha = 0.35 if pale else 1.0
    axes.barh(row, end - start, left=start, height=0.62, color=colour, alpha=alpha, linewidth=0)


def _draw_layers(axes: Any, handoff: Handoff) -> None:
    stages = [
        ("vLLM computes up to the layer's K and V", handoff.computed, _COMPUTE, 0.0, 0.78),
        ("waiting, gathered from the paged cache", handoff.gathered, _GATHER, -0.2, 0.38),
        ("on the wire", _wire(handoff), _SEND, 0.2, 0.38),
    ]
    for label, intervals, colour, offset, height in stages:
        axes.barh(
            [_row(handoff, interval.layer) + offset for interval in intervals],
            [_ms(interval.end - interval.start) for interval in intervals],
            left=[_ms(interval.start) for interval in intervals],
            height=height,
            color=colour,
            label=label,
        )
    axes.plot(
        [_ms(moment) for moment in handoff.resident.values()],
        [_row(handoff, layer) for layer in handoff.resident],
        linestyle="none",
        marker="|",
        markersize=7,
        markeredgewidth=1.6,
        color=_RESIDENT,
        label="layer resident at the receiver",
    )


def _draw_milestones(axes: Any, handoff: Handoff) -> None:
    # Labels at two heights: the tokens may be so close that they would overlap at one.
    marks = [
        (handoff.first_token_ns, "first token (vLLM)", _PREFILL, -4.35),
        (handoff.first_decoded_ns, "first remote token (MLX)", _DECODE, -3.6),
    ]
    for moment, text, colour, height in marks:
        if moment is not None:
            at = _ms(moment)
            axes.axvline(at, color=colour, linewidth=1.2)
            axes.annotate(
                text, (at, height), xytext=(-4, 0), textcoords="offset points", ha="right",
                va="bottom", fontsize=8, color=colour, weight="bold",
            )  # fmt: skip


def _wire(handoff: Handoff) -> list[Interval]:
    return [
        Interval(block.layer, block.sent_ns, max(block.sent_ns, block.committed_ns))
        for block in handoff.blocks
    ]


def _begin(handoff: Handoff) -> float:
    return _ms(min(0, handoff.computed[0].start))


def _row(handoff: Handoff, layer: int) -> int:
    return handoff.layers.index(layer)


def _ms(nanoseconds: int) -> float:
    return nanoseconds / 1e6
