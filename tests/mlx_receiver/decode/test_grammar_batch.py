"""Rows with a grammar in the batch: each as by itself, the others undisturbed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model as mlx_load

from mlx_receiver.decode.engine import DecodeEngine
from mlx_receiver.decode.jobs import Job, Output
from mlx_receiver.decode.local import LocalJob, generate_tokens
from mlx_receiver.decode.model import find_model
from mlx_receiver.http.openai.tokenizer import Tokenizer
from mlx_receiver.wire.messages import WireError
from mlx_receiver.wire.sampling import Grammar, Sampling
from tests.mlx_receiver.client import Prefilled
from tests.mlx_receiver.conftest import Prefill
from tests.mlx_receiver.decode.test_engine import handed_over

EOS = 2
OBJECT = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "n": {"enum": [1, 23, 456]}},
    "required": ["name"],
}
JSON = Grammar("json", json.dumps(OBJECT), closed=True, compact=True)
CODE = Grammar("regex", "[a-c]{3}-[0-9]{2}")
PROMPTS = [[3 * i + n for i in range(20, 20 + length)] for n, length in enumerate((5, 40, 17, 9))]


@pytest.fixture(scope="module")
def engine(tiny_llama_path: Path) -> Iterator[DecodeEngine]:
    engine = DecodeEngine(find_model(str(tiny_llama_path)), max_batch=8)
    engine.start()
    engine.wait_loaded()
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_path: Path) -> Tokenizer:
    return Tokenizer(find_model(str(tiny_llama_path)))


def greedy(grammar: Grammar | None, limit: int = 60, **fields: Any) -> Sampling:
    return Sampling(max_tokens=limit, temperature=0.0, eos_token_id=EOS, grammar=grammar, **fields)


def by_itself(folder: Path, engine: DecodeEngine, prompt: list[int], grammar: Grammar) -> list[int]:
    """mlx-lm's model a token at a time, each masked before it is drawn, in the plainest way."""
    model, _ = mlx_load(folder)
    matcher = engine.grammars.compile(grammar).result(60).begin([EOS], None)
    cache, new, tokens = model.make_cache(), prompt, []
    while len(tokens) < 60 and (not tokens or tokens[-1] != EOS):
        logits = np.array(model(mx.array([new]), cache=cache)[0, -1].astype(mx.float32))
        allowed = matcher.allowed()
        assert allowed is not None
        new = [int(np.argmax(np.where(allowed, logits, -np.inf)))]
        matcher.accept(new[0])
        tokens += new
    return tokens


def test_rows_with_and_without_a_grammar_are_each_as_by_themselves(
    engine: DecodeEngine, tiny_llama_path: Path
) -> None:
    plain = [generate_tokens(engine, prompt, greedy(None)) for prompt in PROMPTS]
    expected = [
        [by_itself(tiny_llama_path, engine, prompt, grammar) for grammar in (JSON, CODE)]
        for prompt in PROMPTS
    ]
    assert all(tokens[-1] == EOS for pair in expected for tokens in pair)
    jobs = [
        LocalJob(engine, prompt, greedy(grammar))
        for prompt in PROMPTS
        for grammar in (None, JSON, CODE)
    ]
    got = [finished(job) for job in jobs]
    for n in range(len(PROMPTS)):
        assert got[3 * n] == plain[n]
        assert got[3 * n + 1 : 3 * n + 3] == expected[n]


def built(engine: DecodeEngine, kv: Prefilled) -> Any:
    """The prompt's caches, as they arrive with a hand-off."""
    return handed_over(engine, kv.prompt, kv.planes, 64).build


def finished(job: LocalJob) -> list[int]:
    tokens: list[int] = []
    while True:
        output = job.next(60)
        tokens += output.token_ids
        if output.finish:
            return tokens


def test_a_hand_off_goes_on_from_its_first_token(
    engine: DecodeEngine, prefill: Prefill, tokenizer: Tokenizer
) -> None:
    kv = prefill(17)
    (brace,) = tokenizer.encode("{", special=False)
    sink = Collector()
    engine.submit(Job(kv.prompt, greedy(JSON), sink, brace, built(engine, kv)))
    text = tokenizer.decode([brace, *sink.tokens()], skip_special=True)
    assert set(json.loads(text)) <= {"name", "n"}


def test_a_first_token_that_the_grammar_does_not_take_is_unsupported(
    engine: DecodeEngine, prefill: Prefill
) -> None:
    kv = prefill(17)
    sink = Collector()
    engine.submit(Job(kv.prompt, greedy(JSON), sink, 5000, built(engine, kv)))
    assert sink.failure()[0] == "unsupported"
    assert generate_tokens(engine, kv.prompt, Sampling(8, temperature=0.0)) == kv.tokens


def test_a_grammar_that_is_none_fails_its_job_only(engine: DecodeEngine) -> None:
    job = LocalJob(engine, PROMPTS[0], greedy(Grammar("regex", "(")))
    with pytest.raises(WireError, match="the grammar is refused"):
        job.next(60)
    assert engine.fault == ""


def test_a_text_that_leaves_its_grammar_fails_alone(
    engine: DecodeEngine, monkeypatch: pytest.MonkeyPatch, prefill: Prefill
) -> None:
    """As where nothing that the request allows is in the grammar."""
    kv = prefill(17)
    neighbour = LocalJob(engine, kv.prompt, Sampling(max_tokens=8, temperature=0.0))
    job = LocalJob(engine, PROMPTS[0], greedy(JSON, allowed_token_ids=[4000, 4001]))
    with pytest.raises(WireError, match="does not conform"):
        finished(job)
    assert finished(neighbour) == kv.tokens


def test_what_follows_an_ignored_end_is_free(engine: DecodeEngine, tokenizer: Tokenizer) -> None:
    sampling = Sampling(
        max_tokens=20, temperature=0.0, grammar=CODE, end_token_ids=[EOS], logprobs=2
    )
    tokens = generate_tokens(engine, PROMPTS[1], sampling)
    end = tokens.index(EOS)
    assert len(tokens) == 20
    assert tokenizer.decode(tokens[:end])[3] == "-"


def test_seeds_repeat_themselves_and_texts_conform(
    engine: DecodeEngine, tokenizer: Tokenizer
) -> None:
    sampling = Sampling(
        max_tokens=80, temperature=1.0, seed=7, eos_token_id=EOS, grammar=JSON, logprobs=3
    )
    first = generate_tokens(engine, PROMPTS[2], sampling)
    assert generate_tokens(engine, PROMPTS[2], sampling) == first
    json.loads(tokenizer.decode(first, skip_special=True))


def test_rows_that_cannot_be_batched(
    engine: DecodeEngine, tiny_llama_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [by_itself(tiny_llama_path, engine, prompt, CODE) for prompt in PROMPTS[:2]]
    assert engine.loaded is not None
    monkeypatch.setattr(engine.loaded.cache, "batched", False)
    jobs = [LocalJob(engine, prompt, greedy(CODE)) for prompt in PROMPTS[:2]]
    assert [finished(job) for job in jobs] == expected


class Collector:
    """A sink that keeps everything."""

    def __init__(self) -> None:
        import queue

        self._said: queue.SimpleQueue[Output | tuple[str, str]] = queue.SimpleQueue()

    def decoded(self, outputs: list[Output]) -> None:
        for output in outputs:
            self._said.put(output)

    def failed(self, job: Job, code: str, reason: str) -> None:
        self._said.put((code, reason))

    def tokens(self) -> list[int]:
        tokens: list[int] = []
        while True:
            output = self._said.get(timeout=60)
            assert isinstance(output, Output), output
            tokens += output.token_ids
            if output.finish:
                return tokens

    def failure(self) -> tuple[str, str]:
        said = self._said.get(timeout=60)
        assert isinstance(said, tuple), said
        return said
