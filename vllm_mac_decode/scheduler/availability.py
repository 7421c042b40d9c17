"""Whether the receiver can take another request now. Used with the relay's lock held."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from mlx_receiver.wire.messages import Welcome
from vllm_mac_decode.scheduler.breaker import CircuitBreaker
from vllm_mac_decode.settings import Settings

if TYPE_CHECKING:
    from vllm_mac_decode.scheduler.port import EnginePort

logger = logging.getLogger("vllm.mac_decode.availability")


class Availability:
    """The receiver's state as far as new requests are concerned."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._breaker = CircuitBreaker()
        #: The connected receiver's; None while there is none.
        self.welcome: Welcome | None = None
        #: What its last Status said.
        self.accepting = True

    def connected(self, welcome: Welcome | None) -> None:
        """Another conversation has begun, or (None) the last one has ended."""
        self.welcome, self.accepting = welcome, True

    def local_reason(self, engine: EnginePort | None, prompt_tokens: int) -> str | None:
        """Why a request with this prompt cannot be handed off now, as a metric label."""
        if not self._settings.enabled:
            return "disabled"
        if engine is None or self.welcome is None:
            return "no_receiver"
        if self._breaker.is_open(time.monotonic()):
            return "circuit_open"
        if engine.weights_changed:
            return "weights_changed"
        if not self.accepting:
            return "receiver_full"
        # Of a prompt that leaves room for one token only, that token is vLLM's own.
        if prompt_tokens + 1 >= self.welcome.max_tokens:
            return "receiver_context"
        return None

    def failed(self) -> None:
        """A hand-off failed by the receiver's fault."""
        pause = self._breaker.failed(time.monotonic())
        if pause:
            logger.warning("hand-offs keep failing; decoding locally for %.0f s", pause)

    def succeeded(self) -> None:
        """A hand-off went well to its end."""
        self._breaker.succeeded()
