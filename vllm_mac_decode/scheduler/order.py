"""What a request itself says of who does what: ``"vllm_xargs": {"mac_decode_offload": "always"}``.

It goes before the setting ``offload``, but for "never", which is the operator's word.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from mlx_receiver.planning.cost import Strategy
from vllm_mac_decode.scheduler.planner import FIXED

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = logging.getLogger("vllm.mac_decode.relay")

#: Our key in vLLM's ``vllm_xargs``.
ORDER: Final = "mac_decode_offload"

#: What a client sends so that a request is handed off whatever the plan, or stays in vLLM.
HAND_OFF: Final[dict[str, Any]] = {"vllm_xargs": {ORDER: "always"}}
KEEP: Final[dict[str, Any]] = {"vllm_xargs": {ORDER: "never"}}


def others(extra_args: Mapping[str, Any] | None) -> bool:
    """Whether something else is among the arguments for plugins, or an order that is none."""
    for name, value in (extra_args or {}).items():
        if name != ORDER:
            return True
        if not (isinstance(value, str) and value in FIXED):
            _explain()
            return True
    return False


def ordered(request: Request) -> Strategy | None:
    """What the request says, None where it says nothing, or nothing that is known."""
    params = request.sampling_params
    said = ((params.extra_args if params is not None else None) or {}).get(ORDER)
    return FIXED.get(said) if isinstance(said, str) else None


@functools.cache
def _explain() -> None:
    logger.warning(
        "a request's vllm_xargs have a %s that is not one of %s: it decodes locally, as all such "
        "requests (this is said once)",
        ORDER,
        ", ".join(FIXED),
    )
