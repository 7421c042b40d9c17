"""One text to produce."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_receiver.http.openai.claims import HandOff
from mlx_receiver.http.openai.text import TextRules
from mlx_receiver.wire.sampling import Sampling


@dataclass(slots=True)
class Sample:
    """A prompt and how to continue it. ``index`` is its choice's.

    ``handoff`` is there when a vLLM prefills the prompt. Where MLX prefills it, ``held`` of its
    tokens were left by an earlier text of the same ``salt``.
    """

    index: int
    prompt: list[int]
    sampling: Sampling
    rules: TextRules
    salt: str = ""
    handoff: HandOff | None = None
    held: int = 0

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were in a prefix cache."""
        return self.held if self.handoff is None else self.handoff.cached_tokens
