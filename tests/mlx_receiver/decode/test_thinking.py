"""Rows with a thinking budget: each as by itself, the others undisturbed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import pytest
from mlx_lm.utils import load_model as mlx_load

from mlx_receiver.decode.engine import DecodeEngine
from mlx_receiver.decode.jobs import Job
from mlx_receiver.decode.local import LocalJob, generate_tokens
from mlx_receiver.decode.model import find_model
from mlx_receiver.decode.sampling import RequestSampler, check_sampling
from mlx_receiver.wire.messages import WireError
from mlx_receiver.wire.sampling import Grammar, Sampling, Thinking
from mlx_receiver.wire.thinking import follow
from tests.mlx_receiver.client import FakeVllm
from tests.mlx_receiver.conftest import Prefill
from tests.mlx_receiver.decode.test_engine import Collector, handed_over

START, END = 11, [700, 701, 702]
PROMPTS = [[*range(20, 20 + n), START, *range(60, 60 + n % 3)] for n in (5, 40, 18, 9)]
BUDGETS = (0, 1, 4, 100)


def thinking(budget: int, runner: Any = "v1", **fields: Any) -> Thinking:
    end = [END[-1]] if runner == "v2" else END
    return msgspec.structs.replace(Thinking(budget, [START], end, END, runner), **fields)


def greedy(told: Thinking | None, **fields: Any) -> Sampling:
    return Sampling(max_tokens=20, temperature=0.0, thinking=told, **fields)


@pytest.fixture(scope="module")
def engine(tiny_llama_path: Path) -> Iterator[DecodeEngine]:
    engine = DecodeEngine(find_model(str(tiny_llama_path)), max_batch=16)
    engine.start()
    engine.wait_loaded()
    yield engine
    engine.stop()


def by_itself(folder: Path, prompt: list[int], told: Thinking, bias: dict[int, float]) -> list[int]:
    """mlx-lm's model a token at a time, each forced or drawn in the plainest way."""
    model, _ = mlx_load(folder)
    text, cache, new, tokens = follow(told, prompt), model.make_cache(), prompt, list[int]()
    while len(tokens) < 20:
        logits = np.array(model(mx.array([new]), cache=cache)[0, -1].astype(mx.float32))
        for token, value in bias.items():
            logits[token] += value
        new = [int(np.argmax(logits)) if text.forced is None else text.forced]
        text.accept(new[0])
        tokens += new
    return tokens


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_rows_with_and_without_a_budget_are_each_as_by_themselves(
    engine: DecodeEngine, tiny_llama_path: Path, runner: str
) -> None:
    plain = [generate_tokens(engine, prompt, greedy(None)) for prompt in PROMPTS]
    asked = [(prompt, greedy(thinking(b, runner))) for prompt in PROMPTS for b in BUDGETS]
    expected = [by_itself(tiny_llama_path, p, s.thinking, {}) for p, s in asked if s.thinking]
    assert sum(END[1] in tokens for tokens in expected) == 3 * len(PROMPTS)
    jobs = [LocalJob(engine, prompt, sampling) for prompt, sampling in asked]
    neighbours = [LocalJob(engine, prompt, greedy(None)) for prompt in PROMPTS]
    assert [job.tokens() for job in jobs] == expected
    assert [job.tokens() for job in neighbours] == plain


def test_reasoning_that_the_model_begins(engine: DecodeEngine, tiny_llama_path: Path) -> None:
    prompt = PROMPTS[0][:5]
    plain = generate_tokens(engine, prompt, greedy(None))
    told = thinking(2, start=[plain[3]])
    expected = by_itself(tiny_llama_path, prompt, told, {})
    assert expected[:4] == plain[:4] and expected[6:9] == END
    assert generate_tokens(engine, prompt, greedy(told)) == expected


def test_rows_that_cannot_be_batched(
    engine: DecodeEngine, tiny_llama_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert engine.loaded is not None
    monkeypatch.setattr(engine.loaded.cache, "batched", False)
    jobs = [LocalJob(engine, prompt, greedy(thinking(3))) for prompt in PROMPTS[:2]]
    expected = [by_itself(tiny_llama_path, p, thinking(3), {}) for p in PROMPTS[:2]]
    assert [job.tokens() for job in jobs] == expected


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_first_token_is_vllms(
    client: FakeVllm, prefill: Prefill, tiny_llama_path: Path, budget: int
) -> None:
    """It counts, or begins the forced end."""
    kv = prefill(tuple(PROMPTS[3]))
    told = thinking(budget)
    expected = by_itself(tiny_llama_path, kv.prompt, told, {})
    session = client.open(kv.prompt, greedy(told))
    client.opened(session)
    client.send_kv(session, kv)
    client.start(session, expected[0])
    assert [expected[0], *client.tokens(session)] == expected


def test_a_first_token_that_ends_the_budget(engine: DecodeEngine, prefill: Prefill) -> None:
    kv = prefill(17)
    told = thinking(0, start=[kv.prompt[-1]])
    for first, follows in ((END[0], END[1:]), (30, END)):
        sink = Collector()
        built = handed_over(engine, kv.prompt, kv.planes, 64).build
        engine.submit(Job(kv.prompt, greedy(told), sink, first, built))
        assert sink.tokens()[: len(follows)] == follows


def test_a_forced_token_that_ends_the_text(engine: DecodeEngine) -> None:
    for fields in ({"eos_token_id": END[1]}, {"stop_token_ids": [END[1]]}):
        sampling = greedy(thinking(3), min_tokens=15, **fields)
        tokens = generate_tokens(engine, PROMPTS[2], sampling)
        assert tokens[3:] == END[:2], "min_tokens does not hold it back"


def test_a_grammar_begins_behind_the_forced_end(engine: DecodeEngine) -> None:
    grammar = Grammar("choice", '["perhaps"]', after=END[-1])
    sampling = greedy(thinking(3), eos_token_id=2, end_token_ids=[2], grammar=grammar)
    tokens = generate_tokens(engine, PROMPTS[2], sampling)
    assert tokens[3:6] == END and tokens[-1] == 2
    plain = greedy(None, eos_token_id=2, grammar=Grammar("choice", '["perhaps"]'))
    assert tokens[6:] == generate_tokens(engine, [*PROMPTS[2], *tokens[:6]], plain)


@pytest.mark.parametrize(
    "fields",
    [{"allowed_token_ids": [3]}, {"logit_bias": {END[0]: -1000.0, 3: 1000.0}},
     {"bad_words_token_ids": [[END[0]]]}, {"min_tokens": 5, "eos_token_id": END[0]},
     {"temperature": 2.0, "top_k": 3, "top_p": 0.1, "min_p": 0.5, "seed": 3},
     {"repetition_penalty": 50.0, "presence_penalty": 1000.0, "frequency_penalty": 2.0}],
    ids=str,
)  # fmt: skip
def test_nothing_outweighs_a_forced_token(fields: dict[str, Any]) -> None:
    sampling = msgspec.structs.replace(greedy(thinking(1), logprobs=1), **fields)
    sampler = RequestSampler(sampling, [START, 4], 0, 1000)
    rng = np.random.default_rng(3)
    for expected in END:
        row = rng.normal(0, 3, (1, 1000)).astype(np.float32)
        (token,) = sampler.draw([START, 4], mx.array(row)).tolist()
        assert token == expected
        found = sampler.pop_logprobs()
        assert found is not None
        # As everywhere, of what the model says.
        raw = row[0] - np.log(np.exp(row[0]).sum())
        assert found.values[0] == pytest.approx(raw[expected], abs=1e-4)
        assert found.rank == (row[0] >= row[0][expected]).sum()
        sampler.accept(token)


@pytest.mark.parametrize("field", ["start", "end", "forced"])
def test_marks_outside_the_vocabulary_are_refused(field: str) -> None:
    for wrong, said in (([5, 1000], "is 1000"), ([], "length >= 1"), ([5] * 2000, "<= 1024")):
        told = thinking(1, **{field: wrong})
        with pytest.raises(WireError, match=said) as error:
            check_sampling(greedy(told), 1000)
        assert field in error.value.reason
