"""What vLLM will do with a request: with ``offload=auto`` it may well keep it, and users wonder."""

from __future__ import annotations

from typing import Final

from mlx_receiver.planning.cost import Link, Load, Pair, Strategy, Work
from mlx_receiver.planning.plan import plan
from mlx_receiver.planning.shapes import kv_bytes
from mlx_receiver.planning.topology import Situation
from mlx_receiver.wire import messages as m
from mlx_receiver.wire.layout import CacheLayout
from vllm_mac_decode.settings import Settings
from vllm_mac_decode.tools.check.finding import Finding, fine, warning
from vllm_mac_decode.tools.check.transfer import Transfer
from vllm_mac_decode.tools.plan.sources import codec, measured

#: The request that is planned, as far as the receiver's context has room for it.
_TOKENS: Final = 8192
_OUTPUT: Final = 256


def check_plan(
    settings: Settings, model: str, layout: CacheLayout, welcome: m.Welcome, transfer: Transfer
) -> Finding:
    """Who does what of a request, while nobody else asks for anything. ``model`` is its folder or
    id."""
    if settings.offload != "auto":
        return _set(settings.offload)
    name = model.rstrip("/").rsplit("/", 1)[-1]
    vllm, mac = measured("vllm", name), welcome.profile
    if vllm is None or mac is None:
        lacking = " and ".join(
            one for one, side in (("vLLM", vllm), ("the receiver", mac)) if side is None
        )
        return fine(
            "plan",
            f"offload=auto: {lacking} will be measured with this model, once connected and idle; "
            "until then requests are handed off",
        )
    work = Work(max(1, min(_TOKENS, welcome.max_tokens - _OUTPUT)), _OUTPUT)
    link = Link(transfer.rate)
    pair = Pair(vllm, mac, link, len(layout.layers), kv_bytes(layout))
    situation = Situation(name, pair, work, Load(), layout, streams=settings.slow_streams)
    made = plan(situation, codec(settings.codec, situation, welcome.codecs))
    figures: dict[str, str | float] = {
        str(found.strategy): round(found.total, 3) for found in made.predictions
    }
    seen = f"offload=auto, {work.prompt:,} tokens in and {work.output} out. {made.why}"
    if made.chosen.strategy is not Strategy.VLLM:
        return fine("plan", seen, **figures)
    return warning(
        "plan",
        f"{seen} Such requests stay in vLLM",
        "Nothing, they are faster so; offload=always (MAC_DECODE_OFFLOAD) hands them off all the "
        "same, and `mac-decode profile` shows how fast each side is",
        **figures,
    )


def _set(offload: str) -> Finding:
    if offload == "never":
        return warning(
            "plan", "offload=never: no request is handed off", "Leave MAC_DECODE_OFFLOAD out"
        )
    return fine("plan", f"offload={offload}: every request that can be is handed off")
