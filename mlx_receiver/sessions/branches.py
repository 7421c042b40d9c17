"""Texts that are being decoded, for prompts that begin like theirs: an agent's branches, which
share its instructions.

What is shared of a prompt is copied out of the batch between two steps (``decode.copies``), and is
a resident like those of texts that have ended: further branches find it there.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from mlx_receiver.decode.jobs import CopyPrompt
from mlx_receiver.sessions.residents import Tokens, common

#: Tokens by which a prompt must share more with a text that is decoded than with what is kept:
#: running responses wait while they are copied.
LEAST_MORE: Final = 64


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """A text that is being decoded, and how its prompt is copied."""

    partition: str
    prompt: Tokens
    copy: CopyPrompt


@dataclass(frozen=True, slots=True)
class Branch:
    """What a prompt shares with such a text: its first ``tokens``."""

    text: Decoded
    tokens: int


class Branches:
    """See the module's text. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._texts: dict[Decoded, None] = {}

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, partition: str, prompt: Sequence[int], copy: CopyPrompt) -> Decoded:
        """A text is decoded until it is removed."""
        text = Decoded(partition, np.array(prompt, np.int32), copy)
        with self._lock:
            self._texts[text] = None
        return text

    def remove(self, text: Decoded) -> None:
        """It has left the batch."""
        with self._lock:
            self._texts.pop(text, None)

    def find(self, partition: str, prompt: Sequence[int]) -> Branch | None:
        """The text of the partition whose prompt shares most of this one's beginning."""
        with self._lock:
            texts = [text for text in self._texts if text.partition == partition]
        if not texts:
            return None
        tokens = np.array(prompt, np.int32)
        branches = [Branch(text, common(text.prompt, tokens)) for text in texts]
        return max(branches, key=lambda branch: branch.tokens)


class Copying:
    """One copy that somebody waits for: what it gives, once it is there."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._wanted = True

    def wanted(self) -> bool:
        """Whether anybody still waits."""
        return self._wanted

    def finish(self) -> None:
        """It is there, or will not be."""
        self._over.set()

    def wait(self, seconds: float) -> None:
        """Wait for that, but not longer."""
        self._over.wait(max(0.0, seconds))
        self._wanted = False
