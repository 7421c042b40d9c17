"""What one check says."""

from __future__ import annotations

from typing import Literal

import msgspec

#: ``warning``: it works, but not as well as it could. ``unchecked``: it could not be looked at.
State = Literal["fine", "warning", "wrong", "unchecked"]


class Finding(msgspec.Struct, frozen=True, omit_defaults=True):
    """What was looked at, what was seen, and what to do if that is not fine.

    ``figures`` are the measured values behind the text, for ``--json``.
    """

    name: str
    state: State
    seen: str
    remedy: str = ""
    figures: dict[str, str | float] = {}


def unchecked(name: str, why: str) -> Finding:
    """It was not looked at."""
    return Finding(name, "unchecked", f"not checked: {why}")
