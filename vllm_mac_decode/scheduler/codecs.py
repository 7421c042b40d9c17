"""How a request's KV travels."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from mlx_receiver.wire.layout import CacheLayout
from mlx_receiver.wire.quantised import RAW, ratio
from mlx_receiver.wire.seldom import printable

logger = logging.getLogger("vllm.mac_decode.relay")

#: The setting that leaves the choice to plans.
AUTO: Final = "auto"

#: What "auto" may choose beside raw. q4 changes what small models say by 5 to 12 % of their
#: perplexity, q8 by less than can be measured (``docs/performance.md``).
_UNASKED: Final = "q8"


def allowed(setting: str, offered: Sequence[str], layout: CacheLayout) -> tuple[str, ...]:
    """The codecs for a cache of that ``layout``, by the setting and by what the receiver has
    ``offered`` (``Welcome.codecs``); what loses least first."""
    if setting == RAW:
        return (RAW,)
    if setting == AUTO:
        useful = _UNASKED in offered and ratio(layout, _UNASKED) < 1
        return (RAW, _UNASKED) if useful else (RAW,)
    if setting not in offered:
        known = printable(", ".join(offered))
        _say(f"the receiver does not know the codec {setting} (it offers {known})")
        return (RAW,)
    if ratio(layout, setting) == 1:
        _say(
            f"nothing of this model's cache can be sent in the codec {setting}: that takes 16-bit "
            "or 32-bit floats in rows of a multiple of 64"
        )
        return (RAW,)
    return (setting,)


def agreed(planned: str, found: Sequence[str]) -> str:
    """The one that was planned, if it is among those that are allowed with the receiver."""
    return planned if planned in found else found[0]


@lru_cache(maxsize=16)
def _say(problem: str) -> None:
    """Once for each problem: every request has the same."""
    logger.warning("%s: KV travels raw", problem)
