"""One text to produce."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_receiver.http.openai.claims import HandOff
from mlx_receiver.http.openai.text import TextRules
from mlx_receiver.wire.messages import Sampling


@dataclass(slots=True)
class Sample:
    """A prompt and how to continue it. ``index`` is its choice's.

    ``handoff`` is there when a vLLM prefills the prompt.
    """

    index: int
    prompt: list[int]
    sampling: Sampling
    rules: TextRules
    handoff: HandOff | None = None

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were in a prefix cache."""
        return 0 if self.handoff is None else self.handoff.cached_tokens
