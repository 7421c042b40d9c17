"""What a coding agent asks for: a seeded trace, without any engine.

A system prompt; turns that each bring a tool's result and get an answer; sub-agents, which start
from an earlier point of the conversation, sometimes two at once; and edits, where the template
leaves out the reasoning that an answer began with.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

SYSTEM_TOKENS: Final = 8192
RESULT_TOKENS: Final = (100, 4000)
ANSWER_TOKENS: Final = (50, 400)
TURNS: Final = 30

#: Turns after which sub-agents work, and the turns after which each of them starts.
_BRANCHES: Final = {10: (3,), 20: (8, 14)}
_BRANCH_TURNS: Final = 3
#: Every so many turns the answer's reasoning is left out, which is this share of it.
_EDIT_EVERY: Final = 7
_REASONING: Final = 0.6


@dataclass(frozen=True)
class Call:
    """One request: of whom (0 is the main conversation), what comes behind the history, and how
    many tokens are to be answered.

    A sub-agent's first call says ``since`` which turn of the main conversation it starts.
    ``stripped`` tokens of the answer before it have been taken out of the history.
    """

    who: int
    turn: int
    new: tuple[int, ...]
    answer: int
    since: int | None = None
    stripped: int = 0


def agent_trace(seed: int, scale: float = 1.0, turns: int = TURNS) -> list[list[Call]]:
    """The calls in order; those of one list are made at once. All lengths are multiplied by
    ``scale``."""
    rng = random.Random(seed)

    def tokens(count: float) -> tuple[int, ...]:
        return tuple(rng.randrange(20, 49000) for _ in range(max(1, round(count * scale))))

    def result() -> tuple[int, ...]:
        low, high = map(math.log, RESULT_TOKENS)
        return tokens(math.exp(rng.uniform(low, high)))

    def answer() -> int:
        return max(3, round(rng.uniform(*ANSWER_TOKENS) * scale))

    steps, before, others = [], 0, 0
    for turn in range(turns):
        new = tokens(SYSTEM_TOKENS) + result() if turn == 0 else result()
        edited = turn > 0 and turn % _EDIT_EVERY == 0
        main = Call(0, turn, new, answer(), None, int(before * _REASONING) if edited else 0)
        before = main.answer
        steps.append([main])
        starts = [since for since in _BRANCHES.get(turn, ()) if since <= turn]
        for number in range(_BRANCH_TURNS if starts else 0):
            steps.append(
                [
                    Call(others + 1 + index, number, result(), answer(), None if number else since)
                    for index, since in enumerate(starts)
                ]
            )
        others += len(starts)
    return steps


class Histories:
    """The texts of a trace while it runs."""

    def __init__(self) -> None:
        self._texts: dict[int, list[int]] = {}
        self._answers: dict[int, int] = {}
        self._main: list[list[int]] = []

    def prompt(self, call: Call) -> list[int]:
        """What the call sends."""
        if call.since is not None:
            text = self._main[call.since]
        else:
            text = self._texts.get(call.who, [])
        if call.stripped:
            begin = len(text) - self._answers[call.who]
            text = text[:begin] + text[begin + call.stripped :]
        return text + list(call.new)

    def answered(self, call: Call, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """What came back."""
        text = [*prompt, *answer]
        self._texts[call.who], self._answers[call.who] = text, len(answer)
        if call.who == 0:
            self._main.append(text)


def longest_common(prompt: Sequence[int], texts: Iterable[Sequence[int]]) -> int:
    """How many of the prompt's first tokens one of the texts begins with, at most."""
    best = 0
    for text in texts:
        if list(text[:best]) != list(prompt[:best]):
            continue
        while best < min(len(text), len(prompt)) and text[best] == prompt[best]:
            best += 1
    return best
