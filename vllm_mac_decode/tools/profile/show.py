"""Profiles as a table and as bars in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mlx_receiver.planning.coding import ASSUMED
from mlx_receiver.wire.profile import Profile
from mlx_receiver.wire.quantised import BITS
from mlx_receiver.wire.seldom import printable
from vllm_mac_decode.tools.profile.sources import Known

#: Prompts, in tokens, that the pictures show.
LENGTHS = (128, 512, 2048, 8192, 32768)
#: Texts that are decoded together.
BATCHES = (1, 8)
#: What takes less was never measured.
_LEAST_SECONDS = 1e-12
_STYLES = {"vllm": "green", "receiver": "magenta"}


def render(known: Sequence[Known], links: Mapping[str, str], width: int) -> RenderableType:
    """Everything, at most so many characters wide; ``links`` as ``sources.links`` says."""
    parts: list[RenderableType] = [_table(known)]
    sides = [(one, one.profile) for one in known if one.profile is not None]
    if sides:
        parts += [
            Text(""),
            Text("Seconds to prefill a prompt", style="bold"),
            *_bars(
                [
                    (one, f"{tokens:,}", profile.prefill.seconds(tokens))
                    for tokens in LENGTHS
                    for one, profile in sides
                ],
                "s",
                width,
            ),
            Text(""),
            Text("Tokens per second decoded, one text, behind a prompt", style="bold"),
            *_bars(
                [
                    (one, f"{tokens:,}", decoded(profile, tokens))
                    for tokens in LENGTHS
                    for one, profile in sides
                ],
                "/s",
                width,
            ),
        ]
    for one in known:
        said = "; ".join(filter(None, [one.origin, _coding_origin(one)]))
        parts.append(Text.assemble((f"{one.title}: ", _STYLES[one.side]), said))
    parts += [Text(f"link of {name}: KV goes to {words}") for name, words in links.items()]
    return Group(*parts)


def decoded(profile: Profile, context: int, rows: int = 1) -> float:
    """Tokens that all texts together get in a second."""
    return _rate(rows, profile.decode.seconds(context, rows))


def _rate(tokens: int, seconds: float) -> float:
    """0 where a profile has nothing, which a file or a receiver may say."""
    return tokens / seconds if seconds > _LEAST_SECONDS else 0.0


def _table(known: Sequence[Known]) -> Table:
    table = Table()
    table.add_column("")
    for one in known:
        table.add_column(one.title, justify="right")
    profiles = [one.profile for one in known]

    def row(name: str, values: list[str]) -> None:
        cells = [v if p is not None else "-" for v, p in zip(values, profiles, strict=True)]
        table.add_row(name, *(Text(printable(cell)) for cell in cells))  # names are no markup

    row("machine", [p.device if p else "" for p in profiles])
    row("model", [p.model.rsplit("/", 1)[-1] if p else "" for p in profiles])
    for tokens in (1024, 8192):
        row(
            f"prefill, {tokens:,} tokens",
            [
                f"{_rate(tokens, p.prefill.seconds(tokens)):,.0f} tokens/s" if p else ""
                for p in profiles
            ],
        )
    row(
        "prefill, 512 behind 32,768",
        [
            f"{_rate(512, p.prefill.seconds(512, 32768)):,.0f} tokens/s" if p else ""
            for p in profiles
        ],
    )
    for tokens in (1024, 32768):
        for rows in BATCHES:
            row(
                f"decode, {rows} x {tokens:,} tokens",
                [f"{decoded(p, tokens, rows):,.1f} tokens/s" if p else "" for p in profiles],
            )
    row("memory for KV", [_bytes(p.kv_bytes) if p else "" for p in profiles])
    row("memory read", [f"{_bytes(p.bandwidth)}/s" if p and p.bandwidth else "-" for p in profiles])
    for codec in BITS:
        row(f"{codec}, of raw KV", [_coding(p, codec) if p else "" for p in profiles])
    for quantile in ("0.5", "0.9"):
        told = [_error(one, quantile) for one in known]
        if any(told):
            row(f"prediction error, p{float(quantile) * 100:.0f}", told)
    return table


def _error(one: Known, quantile: str) -> str:
    found = [
        f"{100 * errors[quantile]:.0f} % ({phase})"
        for phase, errors in (one.errors or {}).items()
        if errors.get(quantile)
    ]
    return ", ".join(found)


def _coding(profile: Profile, codec: str) -> str:
    """How fast all of its threads quantise, or decode what came so."""
    rate, threads = profile.coding.rate(codec), profile.coding.threads
    if not rate:
        return f"({ASSUMED[codec] / 1e9:.2f} GB/s)"
    together = f", {threads:,.1f} threads" if threads > 1 else ""
    return f"{rate * threads / 1e9:,.2f} GB/s{together}"


def _coding_origin(one: Known) -> str:
    """Where that comes from, in words."""
    if one.profile is None:
        return ""
    if not any(map(one.profile.coding.rate, BITS)):
        return "q8 and q4 were not measured: plans take what stands in brackets"
    if one.side == "vllm":
        return "q8 and q4 when it started, quantised as the KV of a request is"
    return "q8 and q4 with it, decoded as blocks that arrive are"


def _bytes(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count else "-"


def _bars(values: Sequence[tuple[Known, str, float]], unit: str, width: int) -> list[Text]:
    longest = max(value for *_, value in values) or 1.0
    room = max(10, width - 34)
    lines = []
    before = ""
    for one, label, value in values:
        # An eighth of a character is the least that can be drawn.
        eighths = max(1, round(8 * room * value / longest))
        bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
        lines.append(
            Text.assemble(
                (f"{label if label != before else '':>7} {one.title:<9}", "dim"),
                (bar, _STYLES[one.side]),
                f" {value:,.4g} {unit}",
            )
        )
        before = label
    return lines
