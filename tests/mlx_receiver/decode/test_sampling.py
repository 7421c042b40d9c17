"""Sampling does what vLLM's sampler does, checked against its rules written out in NumPy."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import pytest

from mlx_receiver.decode.sampling import (
    RequestSampler,
    check_sampling,
    greedy,
    truncate,
)
from mlx_receiver.wire.messages import WireError
from mlx_receiver.wire.sampling import Sampling
from mlx_receiver.wire.stopping import Finish, check_stop

VOCAB = 40
PROMPT = [3, 3, 7, 11]


def reference(logits: np.ndarray, s: Sampling, prompt: list[int], output: list[int]) -> np.ndarray:
    """``apply_logits_processors`` of vllm/v1/sample/sampler.py for one request."""
    x = logits.astype(np.float32).copy()
    if s.allowed_token_ids is not None:
        x[[t for t in range(len(x)) if t not in s.allowed_token_ids]] = -np.inf
    for *prefix, last in s.bad_words_token_ids or []:
        if len(prefix) <= len(output) and output[len(output) - len(prefix) :] == prefix:
            x[last] = -np.inf
    if len(output) < s.min_tokens:
        x[[*s.stop_token_ids, *([] if s.eos_token_id is None else [s.eos_token_id])]] = -np.inf
    for token, bias in (s.logit_bias or {}).items():
        x[token] += bias
    counts = np.bincount(output, minlength=len(x))
    seen = (counts > 0) | (np.bincount(prompt, minlength=len(x)) > 0)
    r = np.float32(s.repetition_penalty)
    x = np.where(seen, np.where(x > 0, x / r, x * r), x)
    return x - s.frequency_penalty * counts - s.presence_penalty * (counts > 0)


def run(sampling: Sampling, rows: np.ndarray, first: int | None = None) -> tuple[list[int], Any]:
    """Tokens sampled from the given logits, stepping as ``BatchGenerator`` does."""
    output = [] if first is None else [first]
    sampler = RequestSampler(sampling, PROMPT, len(output), VOCAB)
    logprobs = []
    for row in rows:
        logits = mx.array(row[None])
        for processor in sampler.processors:
            logits = processor(mx.array(PROMPT + output), logits)
        logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        output.append(int(sampler.sampler(logits).item()))
        logprobs.append(sampler.pop_logprobs())
    return output, logprobs


CASES = {
    "repetition": {"repetition_penalty": 1.7},
    "presence": {"presence_penalty": 1.1},
    "frequency": {"frequency_penalty": 0.7},
    "negative frequency": {"frequency_penalty": -0.7},
    "allowed": {"allowed_token_ids": [3, 8, 9]},
    "bias": {"logit_bias": {5: 4.0, 6: -3.0}},
    "bad word": {"bad_words_token_ids": [[4]]},
    "bad phrases": {"bad_words_token_ids": [[5, 4], [4, 4], [4, 5, 4], [6]]},
    "min tokens": {"min_tokens": 4, "stop_token_ids": [4, 5], "eos_token_id": 6},
    "all": {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "logit_bias": {4: 2.0},
        "bad_words_token_ids": [[4, 5], [9]],
        "allowed_token_ids": list(range(2, 30)),
        "min_tokens": 3,
        "eos_token_id": 5,
    },
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("handed_over", [True, False])
def test_processed_greedy_tokens_are_vllms(name: str, handed_over: bool) -> None:
    sampling = Sampling(max_tokens=99, temperature=0.0, **CASES[name])
    rng = np.random.default_rng(len(name))
    # A few tokens compete closely, so that every rule decides some step.
    rows = rng.normal(0, 1, (30, VOCAB)).astype(np.float32)
    rows[:, 4:7] += 2.5
    output = [4] if handed_over else []
    expected = list(output)
    for row in rows:
        expected.append(int(np.argmax(reference(row, sampling, PROMPT, expected))))
    plain = [*output, *np.argmax(rows, axis=-1).tolist()]
    assert expected != plain, "the case must matter"
    assert run(sampling, rows, 4 if handed_over else None)[0] == expected


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.6, 0.0), (6, 0.7, 0.0), (0, 1.0, 0.2), (9, 0.9, 0.1)],
)
def test_truncation_keeps_what_vllm_keeps(top_k: int, top_p: float, min_p: float) -> None:
    rows = np.random.default_rng(1).normal(0, 2, (8, VOCAB)).astype(np.float32)
    got = np.array(truncate(mx.array(rows), top_k, top_p, min_p))
    for row, result in zip(rows, got, strict=True):
        x = row.copy()
        p = np.exp(x) / np.exp(x).sum()
        x[p < p.max() * min_p] = -np.inf
        order = np.argsort(x)
        if top_k:
            x[order[:-top_k]] = -np.inf
        p = np.exp(x[order]) / np.exp(x).sum()
        cut = np.cumsum(p) <= 1 - top_p
        cut[-1] = False
        if top_p < 1:
            x[order[cut]] = -np.inf
        np.testing.assert_array_equal(np.isinf(result), np.isinf(x))


def test_draws_follow_the_tempered_distribution() -> None:
    sampling = Sampling(max_tokens=9, temperature=0.5, top_k=4, seed=3)
    row = np.full(VOCAB, -9.0, np.float32)
    row[:5] = [1.0, 0.8, 0.5, 0.1, 0.0]
    tokens, _ = run(sampling, np.repeat(row[None], 3000, 0))
    expected = np.exp(row[:4] / 0.5) / np.exp(row[:4] / 0.5).sum()
    np.testing.assert_allclose(np.bincount(tokens, minlength=VOCAB)[:4] / 3000, expected, atol=0.04)
    assert max(tokens) < 4


def test_a_seed_fixes_the_draws_and_another_changes_them() -> None:
    rows = np.random.default_rng(0).normal(0, 0.1, (20, VOCAB)).astype(np.float32)
    one = Sampling(max_tokens=99, seed=11)
    assert run(one, rows, 4)[0] == run(one, rows, 4)[0]
    assert run(one, rows, 4)[0] != run(msgspec.structs.replace(one, seed=12), rows, 4)[0]
    unseeded = msgspec.structs.replace(one, seed=None)
    assert run(unseeded, rows, 4)[0] != run(unseeded, rows, 4)[0]


def test_logprobs_are_of_the_raw_logits() -> None:
    sampling = Sampling(max_tokens=9, temperature=0.0, logit_bias={7: 50.0}, logprobs=3)
    rows = np.random.default_rng(5).normal(0, 2, (4, VOCAB)).astype(np.float32)
    tokens, logprobs = run(sampling, rows, 4)
    assert tokens[1:] == [7] * 4
    for row, entry in zip(rows, logprobs, strict=True):
        raw = row - np.log(np.exp(row).sum())
        best = np.argsort(-raw)[:3]
        assert entry.token_ids == [7, *best]
        np.testing.assert_allclose(entry.values, raw[entry.token_ids], rtol=1e-5)
        assert entry.rank == int((raw >= raw[7]).sum())


def test_named_tokens_are_told_in_place_of_the_likeliest() -> None:
    named = [9, 0, 31]
    sampling = Sampling(max_tokens=9, temperature=0.0, logprobs=3, logprob_token_ids=named)
    rows = np.random.default_rng(6).normal(0, 2, (4, VOCAB)).astype(np.float32)
    tokens, logprobs = run(sampling, rows, 4)
    for token, row, entry in zip(tokens[1:], rows, logprobs, strict=True):
        raw = row - np.log(np.exp(row).sum())
        assert entry.token_ids == [token, *named]
        np.testing.assert_allclose(entry.values, raw[entry.token_ids], rtol=1e-5)


def test_ends_that_do_not_end_the_text_are_held_back() -> None:
    rows = np.zeros((6, VOCAB), np.float32)
    rows[:, 7] = 5.0
    held = Sampling(max_tokens=9, temperature=0.0, min_tokens=4, end_token_ids=[7, 3])
    tokens, _ = run(held, rows)
    assert 7 not in tokens[:4] and tokens[4:] == [7] * (len(tokens) - 4)


def test_no_alternatives_still_report_the_sampled_token() -> None:
    rows = np.random.default_rng(5).normal(0, 2, (2, VOCAB)).astype(np.float32)
    _, logprobs = run(Sampling(max_tokens=9, temperature=0.0, logprobs=0), rows, 4)
    assert [entry.token_ids for entry in logprobs] == [[int(row.argmax())] for row in rows]
    assert [entry.rank for entry in logprobs] == [1, 1]


def test_a_plain_greedy_request_has_the_shared_sampler_and_no_processors() -> None:
    plain = RequestSampler(
        Sampling(max_tokens=9, temperature=0.0, eos_token_id=2, stop_token_ids=[5]),
        PROMPT,
        1,
        VOCAB,
    )
    assert plain.sampler is greedy
    assert plain.processors == []


@pytest.mark.parametrize(
    ("sampling", "token", "outputs", "finish"),
    [
        ({"eos_token_id": 5}, 5, 2, Finish("stop")),
        ({"stop_token_ids": [5]}, 5, 2, Finish("stop", 5)),
        ({"eos_token_id": 5, "stop_token_ids": [5]}, 5, 2, Finish("stop")),
        ({"stop_token_ids": [5]}, 5, 10, Finish("stop", 5)),
        ({}, 5, 10, Finish("length")),
        ({}, 5, 9, Finish()),
    ],
)
def test_stopping_is_vllms_check_stop(
    sampling: dict[str, Any], token: int, outputs: int, finish: Finish
) -> None:
    s = Sampling(max_tokens=10, **sampling)
    assert check_stop(s, token, outputs, 4 + outputs, 100) == finish
    assert check_stop(s, 99, 2, 100, 100) == Finish("length")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("frequency_penalty", float("inf")),
        ("logprobs", -1),
        ("allowed_token_ids", []),
        ("bad_words_token_ids", [[]]),
        ("stop_token_ids", [VOCAB]),
        ("logit_bias", {-1: 1.0}),
    ],
)
def test_unusable_values_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(WireError, match=f"{name}|token id") as caught:
        check_sampling(Sampling(**{"max_tokens": 5, name: value}), VOCAB)
    assert caught.value.code == "unsupported"
