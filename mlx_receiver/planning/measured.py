"""What measuring one side gave."""

from __future__ import annotations

import time
from dataclasses import dataclass

from mlx_receiver.planning.cached import Saved, Side
from mlx_receiver.wire.profile import Profile


@dataclass(frozen=True, slots=True)
class Measured:
    """A profile, the seconds that it took, and how well it fits: of so many samples the median of
    the relative errors of each phase."""

    profile: Profile
    seconds: float
    samples: int
    prefill_error: float
    decode_error: float

    def saved(self, side: Side, key: dict[str, str]) -> Saved:
        """As a file has it; it depends on ``key``."""
        return Saved(
            side=side,
            key=key,
            profile=self.profile,
            made=time.time(),
            seconds=self.seconds,
            samples=self.samples,
            prefill_error=self.prefill_error,
            decode_error=self.decode_error,
        )
