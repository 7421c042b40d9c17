"""What requests tell of vLLM's speed, where they are alone: nobody else's work is in their times.

Called at every step of vLLM's engine: nothing here costs more than a look at each output.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from mlx_receiver.planning.live import Estimate

#: Requests that are known at once; vLLM ends them all, one way or another.
_MOST: Final = 8192


@dataclass(slots=True)
class _Running:
    prompt: int
    tokens: int  # prompt and output
    cached: int
    scheduled_at: float
    begun: bool = False


class Observing:
    """Wants the relay's lock to be held."""

    def __init__(self, estimate: Estimate) -> None:
        self._estimate = estimate
        self._coming: dict[str, int] = {}
        self._running: dict[str, _Running] = {}
        self._alone = ""
        #: The requests whose tokens the last step brought, and when.
        self._last: list[str] = []
        self._at = 0.0

    def added(self, request_id: str, prompt: int) -> None:
        """vLLM has got a request with so many tokens."""
        if len(self._coming) >= _MOST:
            self._coming.clear()
        self._coming[request_id] = prompt

    def scheduled(self, request_id: str, cached: int, now: float) -> None:
        """vLLM computes it from now on, from its token ``cached`` on."""
        prompt = self._coming.pop(request_id, None)
        if prompt is None:
            self.disturbed()
            return
        if len(self._running) >= _MOST:
            self._running.clear()
        self._alone = "" if self._running else request_id
        self._running[request_id] = _Running(prompt, prompt, cached, now)
        self._last = []

    def disturbed(self) -> None:
        """vLLM computes something else besides."""
        self._alone, self._last = "", []

    def gone(self, request_id: str) -> None:
        """vLLM ended it."""
        self._coming.pop(request_id, None)
        if self._running.pop(request_id, None) is not None:
            self.disturbed()

    def stepped(self, outputs: Iterable[tuple[str, int, bool]], now: float) -> None:
        """A step brought so many tokens of these requests, and ended them or not."""
        names: list[str] = []
        context = most = 0
        ended = False
        for request_id, tokens, ends in outputs:
            running = self._running.get(request_id)
            if running is None or not tokens:
                ended = ended or ends
                self._running.pop(request_id, None) if ends else None
                continue
            if not running.begun:
                running.begun = True
                if request_id == self._alone and len(self._running) == 1:
                    self._estimate.observe_prefill(
                        running.prompt - running.cached,
                        running.cached,
                        now - running.scheduled_at,
                        now,
                    )
            names.append(request_id)
            context += running.tokens
            most = max(most, tokens)
            running.tokens += tokens
            if ends:
                ended = True
                del self._running[request_id]
        # Several tokens of one step are guesses that came true: nobody can plan with those.
        if names and names == self._last and most == 1 and len(names) >= len(self._running):
            self._estimate.observe_decode(context // len(names), len(names), now - self._at, now)
        if names or ended:
            self._last = [] if ended else names
            self._at = now
