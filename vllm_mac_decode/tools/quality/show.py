"""The figures as a table."""

from __future__ import annotations

from rich.table import Table

from vllm_mac_decode.tools.quality.figures import Between, Figures
from vllm_mac_decode.tools.quality.measure import Quality


def table(quality: Quality) -> Table:
    """One column for each pair of ways."""
    receiver = quality.receiver_model
    if quality.receiver_dtype:
        receiver += f" ({quality.receiver_dtype})"
    made = Table(title=f"{quality.model} by vLLM, {receiver} by the Mac")
    made.add_column("")
    for heading in ("hand-off from vLLM alone", "hand-off from the Mac alone", "Mac from vLLM"):
        made.add_column(heading, justify="right")
    _add(made, f"the texts, {quality.text.positions} positions", quality.text)
    if quality.responses is not None:
        made.add_section()
        _add(made, f"own responses, {quality.responses.positions} tokens", quality.responses)
    return made


def _add(made: Table, name: str, found: Figures) -> None:
    columns = (found.handoff_from_vllm, found.handoff_from_mac, found.engines)
    made.add_row(f"[bold]{name}[/]")
    made.add_row("mean KL, nats", *map(_kl, columns))
    made.add_row("worst KL, nats", *(f"{one.worst_kl:.3g}" for one in columns))
    made.add_row("same top token", *(f"{one.same_top_token:.1%}" for one in columns))
    made.add_row("listed by both", *(f"{one.known:.1%}" for one in columns))
    if (p := found.perplexity) is not None:
        made.add_row(
            "perplexity",
            f"{p.handoff:.3f}, {p.difference_vllm:+.3f}",
            f"{p.handoff:.3f}, {p.difference_mac:+.3f}",
            f"{p.mac:.3f}, {p.mac - p.vllm:+.3f}",
        )


def _kl(one: Between) -> str:
    return f"{one.mean_kl:.3g} ± {one.error:.1g}"
