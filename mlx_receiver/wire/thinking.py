"""How long a model may reason: the rules of ``thinking_token_budget``, by which the receiver
samples and vLLM's side knows where a text is.

vLLM has a rule for each of its model runners; each is the same in every release that has it (V1:
``vllm/v1/sample/thinking_budget_state.py``, V2: ``vllm/v1/worker/gpu/sample/thinking_budget.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mlx_receiver.wire.sampling import Thinking


class Budget(Protocol):
    """A text, as far as its reasoning goes. Of one thread."""

    @property
    def forced(self) -> int | None:
        """The token that must come next; None where any may."""

    def accept(self, token: int) -> None:
        """Note the text's next token."""


def follow(thinking: Thinking, prompt: Sequence[int]) -> Budget:
    """The text behind a prompt, whose output begins with the next token that is accepted."""
    rule = _RunnerV1 if thinking.runner == "v1" else _RunnerV2
    return rule(thinking, list(prompt))


def rest_of_end(thinking: Thinking, prompt: Sequence[int], output: Sequence[int]) -> list[int]:
    """What follows of a forced end that the output breaks off in, where vLLM would begin it anew if
    the output were part of the prompt."""
    forced, output = thinking.forced, list(output)
    begun = any(output[-size:] == forced[:size] for size in range(1, len(forced)))
    if thinking.runner != "v1" or not begun:
        return []
    text = _RunnerV1(thinking, list(prompt))
    for token in output:
        text.accept(token)
    return text.rest


class _RunnerV2:
    """See ``Budget``. The rule of model runner V2: what counts is which mark came last in prompt
    and output."""

    def __init__(self, thinking: Thinking, prompt: list[int]) -> None:
        self._thinking = thinking
        self._length = len(prompt)
        self._kept = max(map(len, (thinking.start, thinking.end, thinking.forced)))
        self._tail = prompt[-self._kept :]
        self._start = _last(prompt, thinking.start)
        self._end = _last(prompt, thinking.end, max(0, self._start))

    def accept(self, token: int) -> None:
        thinking = self._thinking
        self._tail = [*self._tail, token][-self._kept :]
        self._length += 1
        if _ends(self._tail, thinking.start):
            self._start = self._length - len(thinking.start)
        if _ends(self._tail, thinking.end):
            self._end = self._length - len(thinking.end)

    @property
    def forced(self) -> int | None:
        thinking = self._thinking
        if self._start < 0 or self._start <= self._end:
            return None
        if self._length - self._start - len(thinking.start) < thinking.budget:
            return None
        # The forced tokens go on behind as many of them as are there.
        for size in range(len(thinking.forced) - 1, 0, -1):
            if _ends(self._tail, thinking.forced[:size]):
                return thinking.forced[size]
        return thinking.forced[0]


class _RunnerV1:
    """See ``Budget``. The rule of model runner V1: reasoning that the prompt began, and then one
    after the other.

    It differs from the other rule, and from what one would expect, in texts whose marks come twice
    or in another order. vLLM counts down, and looks closer only when nothing is left.
    """

    def __init__(self, thinking: Thinking, prompt: list[int]) -> None:
        self._thinking = thinking
        self._prompt = len(prompt)
        #: Output tokens; those among them where the budget was looked at last.
        self._length = self._seen = 0
        #: The latest output tokens since the last reasoning ended.
        self._tail: list[int] = []
        self._kept = max(len(thinking.start), len(thinking.end))
        #: Where in the output its marks are; what of the budget is left, as vLLM counts it down.
        self._start = self._end = -1
        self._left = thinking.budget
        #: How many of the forced tokens are there, while they are forced.
        self._forcing = False
        self._said = 0
        start = _last(prompt, thinking.start)
        #: Whether the prompt began the reasoning; where the mark ends in it is then the start.
        self._begun = start > _last(prompt, thinking.end, max(0, start))
        if self._begun:
            self._start = start + len(thinking.start) - 1
            self._left -= self._prompt - start - len(thinking.start)
            self._forcing = self._left <= 0

    @property
    def forced(self) -> int | None:
        return self._thinking.forced[self._said] if self._forcing else None

    @property
    def rest(self) -> list[int]:
        """The forced tokens that are missing, if others are there."""
        return self._thinking.forced[self._said :] if self._forcing and self._said else []

    def accept(self, token: int) -> None:
        thinking = self._thinking
        self._tail = [*self._tail, token][-self._kept :]
        self._length += 1
        if self._start < 0 and _ends(self._tail, thinking.start):
            self._start = self._length - len(thinking.start)
        if self._end < 0 and _ends(self._tail, thinking.end):
            self._end = self._length - len(thinking.end)
        if not self._forcing and not self._begun and 0 <= self._start < self._end:
            self._leave()
        elif self._start >= 0:
            self._count(token)

    def _count(self, token: int) -> None:
        """The token belongs to the reasoning, or ends it."""
        thinking = self._thinking
        counts = self._begun or self._seen
        left = self._left - (self._length - (self._seen if counts else len(thinking.start)))
        ended = self._begun and self._end >= 0
        self._seen = self._length
        if not self._forcing and left > 0 and not ended:
            self._left = left
            return
        if self._forcing and not self._said:
            self._forcing = token == thinking.forced[0]
        if self._forcing:
            self._said += 1
            if self._said == len(thinking.forced):
                self._leave()
        elif ended or self._start <= self._end:
            self._leave()
        else:
            # In the prompt each token of the mark but the first makes it count one less.
            began = self._start + len(thinking.start) - self._prompt * self._begun
            count = self._length - began
            self._left = max(0, thinking.budget - count)
            if count >= thinking.budget:
                self._forcing, self._left = True, thinking.budget

    def _leave(self) -> None:
        """The reasoning is over; the next one has a budget of its own."""
        self._start = self._end = -1
        self._left = self._thinking.budget
        self._forcing = self._begun = False
        self._said = 0
        self._tail = []


def _ends(tokens: list[int], mark: list[int]) -> bool:
    return tokens[-len(mark) :] == mark


def _last(tokens: list[int], mark: list[int], since: int = 0) -> int:
    """Where the mark is for the last time, from ``since`` on; -1 where it is not."""
    for at in range(len(tokens) - len(mark), since - 1, -1):
        if tokens[at] == mark[0] and tokens[at : at + len(mark)] == mark:
            return at
    return -1
