"""What a check says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

import msgspec

if TYPE_CHECKING:
    from rich.console import Console

_MARKS: Final = {"fine": "[green]✓[/]", "warning": "[yellow]![/]", "wrong": "[red]✗[/]"}


class Finding(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What was seen of one thing, whether that is fine, and what to do about it.

    ``figures`` are the measured values behind the text, for ``--json``.
    """

    name: str
    state: Literal["fine", "warning", "wrong"]
    seen: str
    remedy: str = ""
    figures: dict[str, str | float] = {}


def fine(name: str, seen: str, **figures: str | float) -> Finding:
    """Nothing to do."""
    return Finding(name=name, state="fine", seen=seen, figures=figures)


def warning(name: str, seen: str, remedy: str, **figures: str | float) -> Finding:
    """It works, but could be better, or could not be looked at."""
    return Finding(name=name, state="warning", seen=seen, remedy=remedy, figures=figures)


def wrong(name: str, seen: str, remedy: str) -> Finding:
    """It does not work."""
    return Finding(name=name, state="wrong", seen=seen, remedy=remedy)


def show(console: Console, finding: Finding) -> None:
    """For people."""
    from rich.markup import escape

    console.print(f"{_MARKS[finding.state]} {escape(finding.seen)}", soft_wrap=True)
    if finding.remedy:
        console.print(f"  → {escape(finding.remedy)}", soft_wrap=True)
