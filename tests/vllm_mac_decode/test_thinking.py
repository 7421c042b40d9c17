"""The rules of thinking budgets are vLLM's own: both engines' code reads the same texts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor.interface import BatchUpdate
from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder

from mlx_receiver.wire.sampling import Thinking
from mlx_receiver.wire.thinking import follow, rest_of_end

VOCABULARY = 6
WORD = st.integers(0, VOCABULARY - 1)
MARK = st.lists(WORD, min_size=1, max_size=3)
#: Mostly a single token each, of which texts have many.
MARKS = st.tuples(st.just([1]) | MARK, st.just([2]) | MARK, st.just([3, 2]) | st.just([2]) | MARK)
#: What comes next, also where something is forced: first tokens are vLLM's, but not always of a
#: rule that a budget has.
Text = list[tuple[int, bool]]
TEXT = st.lists(st.tuples(WORD, st.integers(0, 9).map(bool)), min_size=1, max_size=24)
PROMPT = st.lists(WORD, max_size=12)
BUDGET = st.integers(0, 6)

#: Which token is forced behind this output, if one is.
Forced = Callable[[list[int]], int | None]


class RunnerV1:
    """vLLM's ``ThinkingBudgetStateHolder`` with the request in the second of two rows."""

    def __init__(self, thinking: Thinking, prompt: list[int]) -> None:
        marks: Any = SimpleNamespace(
            reasoning_start_token_ids=thinking.start, reasoning_end_token_ids=thinking.forced
        )
        self._holder = ThinkingBudgetStateHolder(marks, 2, 0, torch.device("cpu"), False)
        params = SamplingParams(thinking_token_budget=thinking.budget)
        self._output: list[int] = []
        other = (0, SamplingParams(), [], [])
        added = [other, (1, params, prompt, self._output)]
        self._holder.sync_batch(BatchUpdate(2, removed=[], added=added, moved=[]))

    def __call__(self, output: list[int]) -> int | None:
        self._holder.update_state([[], output], [[], []])
        return forced(self._holder.apply_to_logits(torch.zeros(2, VOCABULARY), False, [[], []]))


def forced(logits: torch.Tensor) -> int | None:
    assert not logits[0].any()
    found = (logits[1] > 1e8).nonzero().flatten().tolist()
    assert len(found) < 2
    return found[0] if found else None


#: vLLM's kernels for a GPU, run by Triton's interpreter: it must be on before Triton is imported.
KERNELS = """
import importlib.util, json, sys
import torch, triton, triton.language, vllm.triton_utils
vllm.triton_utils.tl, vllm.triton_utils.triton = triton.language, triton
import vllm.v1.worker.gpu.sample.thinking_budget as kernels

def ids(*values):
    return torch.tensor(values, dtype=torch.int32)

print("ready", flush=True)
for line in sys.stdin:
    budget, start, end, forced, prompt, texts = json.loads(line)
    text, found = prompt + texts, []
    cached = ids(-1, -1), ids(-1, -1), ids(0, 0)
    for size in range(len(prompt), len(text)):
        logits = torch.zeros(2, 6)
        tokens = torch.zeros(2, 64, dtype=torch.int32)
        tokens[1, :size] = ids(*text[:size])
        kernels.apply_thinking_budget(
            logits, ids(0, 1), ids(0, 1), ids(-1, budget), tokens, ids(0, size), ids(0, 0),
            ids(0, 0), *cached, ids(*start), ids(*end), ids(*forced))
        found.append(logits.tolist())
    print(json.dumps(found), flush=True)
"""


@pytest.fixture(scope="module")
def kernels() -> Iterator[subprocess.Popen[str]]:
    pytest.importorskip("vllm.v1.worker.gpu.sample.thinking_budget")  # vLLM 0.28 on
    pytest.importorskip("triton")
    process = subprocess.Popen(
        [sys.executable, "-c", KERNELS],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while "ready" not in (line := process.stdout.readline()):
        assert line, "it has ended"
    yield process
    process.kill()
    process.wait()


@settings(max_examples=600, deadline=None)
@given(MARKS, BUDGET, PROMPT, TEXT)
def test_model_runner_v1(
    marks: tuple[list[int], ...], budget: int, prompt: list[int], text: Text
) -> None:
    start, _, end = marks
    thinking = Thinking(budget, start, end, end, "v1")
    theirs, ours, output = RunnerV1(thinking, prompt), follow(thinking, prompt), list[int]()
    for token, obeys in text:
        must = theirs(output)
        assert ours.forced == must, output
        assert theirs(output) == must  # a step of which nothing came
        output.append(must if must is not None and obeys else token)
        ours.accept(output[-1])


@settings(max_examples=40, deadline=None)
@given(marks=MARKS, budget=BUDGET, prompt=PROMPT, text=TEXT)
@example(marks=([1], [2], [3, 3, 2]), budget=1, prompt=[1], text=[(0, True)] * 6)
def test_model_runner_v2(
    kernels: subprocess.Popen[str], marks: tuple[list[int], ...], budget: int, prompt: list[int],
    text: Text,
) -> None:  # fmt: skip
    thinking = Thinking(budget, *marks, "v2")
    ours, output, found = follow(thinking, prompt), list[int](), list[int | None]()
    for token, obeys in text[:10]:
        found.append(ours.forced)
        output.append(token if found[-1] is None or not obeys else found[-1])
        ours.accept(output[-1])
    assert kernels.stdin is not None and kernels.stdout is not None
    print(json.dumps([budget, *marks, prompt, output]), file=kernels.stdin, flush=True)
    rows = json.loads(kernels.stdout.readline())
    assert [forced(torch.tensor(logits)) for logits in rows] == found


# --- continuations ------------------------------------------------------------------------------


START, PLAIN = 5, st.lists(st.integers(0, 1), max_size=6)


@settings(max_examples=600, deadline=None)
@given(
    end=st.sampled_from([[2], [3, 2], [4, 3, 2], [2, 2]]),
    budget=BUDGET,
    prompt=st.tuples(PLAIN, st.sampled_from([[], [START]]), PLAIN),
    words=st.lists(st.sampled_from([0, 1, 0, 1, 2, 3, START]), min_size=24, max_size=24),
    cut=st.integers(0, 20),
)
def test_a_continuation_behind_model_runner_v1_counts_on(
    end: list[int], budget: int, prompt: tuple[list[int], ...], words: list[int], cut: int
) -> None:
    """Where the receiver breaks off, what it has sent becomes prompt: vLLM goes on as it would
    have, once a forced end that was begun is complete."""
    before = [*prompt[0], *prompt[1], *prompt[2]]
    whole = written(RunnerV1(Thinking(budget, [START], end, end, "v1"), before), words)
    # Texts that have a mark where it means nothing are counted otherwise (docs/features.md).
    assume(in_order([*before, *whole], START, end))
    sent = whole[:cut]
    rest = rest_of_end(Thinking(budget, [START], end, end, "v1"), before, sent)
    assert rest == whole[cut : cut + len(rest)]
    sent += rest
    again = RunnerV1(Thinking(budget, [START], end, end, "v1"), [*before, *sent])
    assert [*sent, *written(again, words[len(sent) :])] == whole


def written(rule: Forced, words: list[int]) -> list[int]:
    """What a model that would say the words says under the rule."""
    output: list[int] = []
    for word in words:
        must = rule(list(output))
        output.append(word if must is None else must)
    return output


def in_order(tokens: list[int], start: int, end: list[int]) -> bool:
    """Whether the marks take turns."""
    found = []
    for at, token in enumerate(tokens):
        if token == start:
            found.append("start")
        if tokens[: at + 1][-len(end) :] == end:
            found.append("end")
    turns = ["start", "end"] * len(found)
    return found == turns[: len(found)]
