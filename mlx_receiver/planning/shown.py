"""What a receiver's ``/profile`` says."""

from __future__ import annotations

import msgspec

from mlx_receiver.planning.cached import Saved
from mlx_receiver.wire.messages import DataPath
from mlx_receiver.wire.profile import Profile


class Shown(msgspec.Struct, frozen=True):
    """``profile`` as it is at present, ``saved`` as it was measured; ``errors``: of each phase's
    latest predictions, by quantile, the relative error that so many of them stay within; ``links``:
    of each vLLM that has measured it the way of its KV to the receiver."""

    profile: Profile | None = None
    saved: Saved | None = None
    measuring: bool = False
    errors: dict[str, dict[str, float]] = {}
    links: dict[str, DataPath] = {}
