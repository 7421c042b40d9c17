"""A client cannot tell vLLM with a receiver from vLLM alone.

Every request of ``equality_cases`` is sent to ``vllm serve`` as it is, then to ``vllm serve
--kv-connector mac_decode`` with a receiver, in fp32 on a model on which both engines agree, and
every field of the answers is compared. The metrics say which requests the receiver decoded.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.answers import Answer, ask, differences
from tests.e2e.conftest import ARGS
from tests.e2e.equality_cases import (
    CASES,
    HANDED_OFF,
    LONG_PROMPT,
    MESSAGES,
    NOT_DECODED,
    PROMPT,
    Case,
    Known,
)
from tests.servers import Vllm, start_vllm

pytestmark = [pytest.mark.server, pytest.mark.slow]

#: Differences that are known and meant: case -> where -> why.
KNOWN_DIFFERENCES: dict[str, dict[str, str]] = {}

#: What vLLM's own dashboards show; each must count the same.
DASHBOARD = (
    "generation_tokens_total", "prompt_tokens_total", "time_to_first_token_seconds_count",
    "e2e_request_latency_seconds_count", "inter_token_latency_seconds_count",
    "request_generation_tokens_sum",
)  # fmt: skip


@dataclass
class Effect:
    """What one request did to the connector's metrics."""

    tokens: float
    local: dict[str, float]
    fallbacks: float


class Side:
    """A server and what it answered."""

    def __init__(self, vllm: Vllm) -> None:
        self.vllm = vllm
        self.http = httpx.Client(base_url=vllm.url, timeout=120)
        self.answers: dict[str, Answer] = {}
        self.effects: dict[str, Effect] = {}
        self.totals: Counter[str] = Counter()
        self.flushes = 0

    def post(self, **fields: Any) -> dict[str, Any]:
        """``POST /v1/completions``, with token ids."""
        body = {"model": "m", "return_token_ids": True} | fields
        answer = self.http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def known(self) -> Known:
        """What the model says undisturbed."""
        greedy = {"temperature": 0, "ignore_eos": True}
        free = self.post(prompt=PROMPT, max_tokens=40, logprobs=0, **greedy)["choices"][0]
        long = self.post(prompt=LONG_PROMPT, max_tokens=140, **greedy)["choices"][0]
        body = {"model": "m", "messages": MESSAGES, "temperature": 0, "max_completion_tokens": 40}
        chat = ask(self.http, "/v1/chat/completions", body).value["choices"][0]["message"]
        return Known(
            free["text"],
            free["token_ids"],
            free["logprobs"]["tokens"],
            chat["content"],
            [*long["prompt_token_ids"], *long["token_ids"]],
        )

    def metrics(self) -> tuple[Effect, Counter[str]]:
        """The connector's counters and vLLM's own.

        What the receiver does is counted with vLLM's next step, so one is made.
        """
        self.post(prompt=[5, 6, 7], max_tokens=1)
        self.flushes += 1
        effect, totals = Effect(0, Counter(), 0), Counter[str]()
        for family in text_string_to_metric_families(self.http.get("/metrics").text):
            for sample in family.samples:
                name = sample.name.removeprefix("vllm:")
                if name == "mac_decode_tokens_total":
                    effect.tokens = sample.value
                elif name == "mac_decode_fallbacks_total":
                    effect.fallbacks += sample.value
                elif name == "mac_decode_local_total":
                    effect.local[sample.labels["reason"]] = sample.value
                elif name in DASHBOARD:
                    totals[name] += sample.value
                elif name == "request_success_total":
                    totals[f"finished: {sample.labels['finished_reason']}"] += sample.value
        effect.local["short_output"] -= self.flushes
        return effect, totals

    def run(self, known: Known | None = None) -> Known:
        """Ask everything."""
        effect, before = self.metrics()
        said = self.known()
        assert known is None or said == known
        effect, _ = self.metrics()
        for case in CASES:
            self.answers[case.name] = ask(self.http, case.path, case.body(said))
            last, (effect, self.totals) = effect, self.metrics()
            local = {r: n - last.local[r] for r, n in effect.local.items() if n != last.local[r]}
            self.effects[case.name] = Effect(
                effect.tokens - last.tokens, local, effect.fallbacks - last.fallbacks
            )
        self.totals.subtract(before)
        return said


@pytest.fixture(scope="module")
def sides(
    tiny_llama_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> list[Side]:
    """vLLM alone, which no longer runs, and vLLM with a receiver, which does."""
    log = tmp_path_factory.mktemp("equality") / "alone.log"
    lonely = start_vllm(tiny_llama_path, log, args=ARGS, wait=False)
    try:
        vllm, _ = request.getfixturevalue("served")  # both start at once
        lonely.wait_healthy()
        alone, together = Side(lonely), Side(vllm)
        known = alone.run()
    finally:
        lonely.server.stop()
    together.run(known)
    return [alone, together]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_answer_is_vllms_own(sides: list[Side], case: Case) -> None:
    alone, together = (side.answers[case.name] for side in sides)
    assert alone.status == case.status, alone.value
    assert together.status == alone.status, together.value
    assert together.content_type == alone.content_type
    assert together.order == alone.order
    found = differences(alone.value, together.value)
    expected = KNOWN_DIFFERENCES.get(case.name, {})
    assert [line for line in found if line.split(": ")[0] not in expected] == []
    assert len(found) == len(expected), "a known difference is none any more"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_was_decoded_where_it_should_be(sides: list[Side], case: Case) -> None:
    together = sides[1]
    effect = together.effects[case.name]
    assert effect.fallbacks == 0
    if case.where != HANDED_OFF:
        assert set(effect.local) == {case.where} - {NOT_DECODED}
        assert effect.tokens == 0
        return
    assert effect.local == {}
    value = together.answers[case.name].value
    usage = {} if isinstance(value, list) else value.get("usage") or {}
    produced = usage.get("completion_tokens", usage.get("output_tokens"))
    if produced is not None:
        # The first token of each sample is vLLM's own. The receiver decodes on until it hears of
        # a stop string, which vLLM finds.
        remote = produced - len(value.get("choices", "1"))
        assert effect.tokens == remote or ("stop" in case.fields and effect.tokens > remote)
    else:
        assert effect.tokens > 0


def test_vllms_own_metrics_count_the_same(sides: list[Side]) -> None:
    alone, together = sides
    assert together.totals == alone.totals


# --- sampling ----------------------------------------------------------------------------------


def sampled(side: Side, **fields: Any) -> list[list[int]]:
    """Token ids of each sample of a request that must have been handed off."""
    before, _ = side.metrics()
    body = {"prompt": PROMPT, "max_tokens": 24, "ignore_eos": True} | fields
    found = [choice["token_ids"] for choice in side.post(**body)["choices"]]
    after, _ = side.metrics()
    assert after.local == before.local and after.fallbacks == before.fallbacks
    assert after.tokens - before.tokens == sum(len(tokens) - 1 for tokens in found)
    return found


def test_seeds_reproduce_on_the_same_receiver(sides: list[Side]) -> None:
    random = {"temperature": 0.9, "top_p": 0.95, "n": 3}
    first = sampled(sides[1], seed=11, **random)
    assert len({tuple(tokens) for tokens in first}) == 3
    assert sampled(sides[1], seed=11, **random) == first
    assert sampled(sides[1], seed=12, **random) != first


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_the_narrowest_sampling_is_greedy(sides: list[Side], narrow: dict[str, Any]) -> None:
    greedy = sampled(sides[1], temperature=0)
    assert sampled(sides[1], temperature=1.0, **narrow) == greedy


@pytest.mark.parametrize(
    "fields",
    [{"temperature": 0.7}, {"top_p": 0.5}, {"top_k": 20}, {"min_p": 0.1}, {"temperature": 1.7}],
    ids=str,
)
def test_random_requests_are_handed_off_and_differ(
    sides: list[Side], fields: dict[str, Any]
) -> None:
    found = sampled(sides[1], n=4, **({"temperature": 1.0} | fields))
    assert [len(tokens) for tokens in found] == [24] * 4
    assert len({tuple(tokens) for tokens in found}) > 1


def test_samples_follow_the_distribution(sides: list[Side]) -> None:
    """The second token, the receiver's, after the likeliest first one: top_k 3, temperature 2."""
    side = sides[1]
    first = side.post(prompt=PROMPT, temperature=0, max_tokens=1)["choices"][0]
    prompt = [*first["prompt_token_ids"], *first["token_ids"]]
    shown = side.post(prompt=prompt, temperature=0, max_tokens=1, logprobs=3,
                      return_tokens_as_token_ids=True)["choices"][0]["logprobs"]  # fmt: skip
    likely = {int(name.split(":")[1]): value for name, value in shown["top_logprobs"][0].items()}
    weights = {token: math.exp(value / 2) for token, value in likely.items()}
    force = {"allowed_token_ids": sorted({*first["token_ids"], *likely})}
    # The first token is drawn among the same few, so only some samples begin as wanted.
    seconds = Counter(
        tokens[1]
        for _ in range(8)
        for tokens in sampled(side, n=32, max_tokens=2, top_k=3, temperature=2.0, **force)
        if tokens[0] == first["token_ids"][0]
    )
    drawn, whole = sum(seconds.values()), sum(weights.values())
    assert drawn >= 40 and set(seconds) <= set(weights)
    chi = sum(
        (seconds[token] - drawn * weight / whole) ** 2 / (drawn * weight / whole)
        for token, weight in weights.items()
    )
    assert chi < 16.3, (seconds, weights)  # p < 0.0003 with two degrees of freedom
