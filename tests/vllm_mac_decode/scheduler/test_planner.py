"""What the planner chooses, and when it changes its mind."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Collection, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_receiver.planning.cost import RAW, Codec, Link, Load, Pair, Prediction, Strategy, Work
from mlx_receiver.wire.profile import Decode, Prefill, Profile
from vllm_mac_decode.scheduler.choices import CLEAR, MARGIN, PATIENCE
from vllm_mac_decode.scheduler.planner import (
    Corrections,
    Decision,
    Outputs,
    Plan,
    Planner,
    Question,
)

VLLM, SPLIT, MAC, MEET = Strategy
ALL = frozenset(Strategy)
NOBODY = Load()

#: Of the published set-up: 8192 tokens in 1.47 s and 5.57 s, 26 and 90 ms a token.
SPARK = Profile("spark", "8b", Prefill(0.0, 1.8e-4, 0, 8192), Decode(0.088, 0.001, 0))
STUDIO = Profile("studio", "8b", Prefill(0.0, 6.8e-4, 0, 2048), Decode(0.026, 0.001, 0))


def pair(rate: float = 1.25e9) -> Pair:
    return Pair(SPARK, STUDIO, Link(rate, 0.0005), 32, lambda a, b: max(0, b - a) * 131072)


def decide(
    planner: Planner,
    work: Work,
    load: Load,
    pair: Pair | None,
    allowed: Collection[Strategy],
    now: float = 0.0,
    codecs: Sequence[Codec] = (RAW,),
    **known: Any,
) -> Decision:
    return planner.decide(Question(work, load, pair, allowed, codecs, **known), now)


def chosen(work: Work, load: Load = NOBODY, rate: float = 1.25e9) -> Strategy:
    return decide(Planner(), work, load, pair(rate), ALL, 0.0).strategy


def test_each_is_chosen_where_it_is_the_fastest() -> None:
    work = Work(8192, 32)
    assert chosen(work) is SPLIT
    assert chosen(work, rate=12.5e6) is VLLM, "the link is slow"
    assert chosen(Work(8192, 512), rate=12.5e6) is MAC, "and the text long"
    assert chosen(Work(8192, 256), rate=125e6) is MEET
    assert chosen(Work(8192, 32, cached=0, held=8000)) is MAC, "it has nearly everything"
    assert chosen(work, Load(mac_rows=100)) is VLLM
    assert chosen(work, Load(vllm_seconds=60)) is MAC


@pytest.mark.parametrize(
    ("offload", "allowed", "expected"),
    [
        ("always", ALL, (SPLIT, "setting")),
        ("never", ALL, (VLLM, "setting")),
        ("never", {SPLIT}, (VLLM, "setting")),
        ("mac", ALL, (MAC, "setting")),
        ("meet", ALL, (MEET, "setting")),
        ("meet", {VLLM, SPLIT, MAC}, (SPLIT, "only")),
        ("mac", {VLLM, SPLIT}, (SPLIT, "only")),
        ("mac", {VLLM}, (VLLM, "only")),
        ("auto", {SPLIT}, (SPLIT, "only")),
        ("auto", set(), (VLLM, "unknown")),
        ("auto", ALL, (SPLIT, "unknown")),
        ("auto", {VLLM, MAC}, (VLLM, "only")),
    ],
)
def test_without_a_profile(
    offload: str, allowed: set[Strategy], expected: tuple[Strategy, str]
) -> None:
    decision = decide(Planner(offload), Work(100, 10), NOBODY, None, allowed, 0.0)
    assert (decision.strategy, decision.reason) == expected
    assert decision.prediction is None and decision.text == f"{expected[0]} ({expected[1]})"


def test_the_threshold_counts_what_vllm_would_compute() -> None:
    planner = Planner("always", threshold=100)
    assert decide(planner, Work(1000, 9, cached=901), NOBODY, None, ALL, 0.0).strategy is VLLM
    assert decide(planner, Work(1000, 9, cached=900), NOBODY, None, ALL, 0.0).strategy is SPLIT
    assert decide(planner, Work(1000, 9, 901), NOBODY, None, {SPLIT}, 0.0).strategy is SPLIT


# --- how KV travels -----------------------------------------------------------------------------

HALF, QUARTER = Codec("q8", 0.53, 0.65e9, 0.65e9), Codec("q4", 0.28, 0.65e9, 0.65e9)


def travels(gbit: float, planner: Planner | None = None, **known: Any) -> str:
    """A prompt of the published set-up's, whoever decodes."""
    codecs = known.pop("codecs", (RAW, HALF))
    work = known.pop("work", Work(8192, 32))
    planner = planner or Planner("always")
    return decide(planner, work, NOBODY, pair(gbit / 8 * 1e9), ALL, 0.0, codecs, **known).codec.name


def test_a_codec_is_chosen_only_of_those_allowed() -> None:
    slow, work = pair(60e6), Work(2048, 128)
    allowed = {VLLM, SPLIT}
    raw = decide(Planner(), work, NOBODY, slow, allowed)
    assert raw.codec is RAW
    both = decide(Planner(), work, NOBODY, slow, allowed, 0.0, (RAW, HALF))
    assert (both.strategy, both.codec) == (SPLIT, HALF) and "split q8 (fastest: " in both.text
    named = decide(Planner(), work, NOBODY, pair(1e12), allowed, 0.0, (QUARTER,))
    assert (named.strategy, named.codec) == (SPLIT, QUARTER), "one that was asked for"


def test_what_loses_something_is_chosen_on_slow_links_only() -> None:
    assert [travels(gbit) for gbit in (40, 10, 5, 2.5, 1, 0.1)] == ["raw"] * 3 + ["q8"] * 3
    assert travels(0.1, codecs=(RAW, HALF, QUARTER)) == "q4", "if that is allowed"
    text = decide(Planner("always"), Work(8192, 32), NOBODY, pair(1e8), ALL, 0.0, (RAW, HALF)).text
    assert text == "split q8 (setting)"


def test_the_crossover_is_where_quantising_is_as_fast_as_the_link() -> None:
    """With the prefill's time as nothing, of a text whose decoding is nothing, either."""
    instant = Profile("s", "m", Prefill(1e-6, 0.0, 0.0, 8192), Decode(1e-6, 0.0, 0.0))
    for gbit in (0.5, 1.0, 2.0, 4.0, 4.5, 5.0, 6.0, 12.0):
        there = Pair(instant, instant, Link(gbit / 8 * 1e9), 32, lambda a, b: (b - a) * 131072)
        decision = decide(Planner("always"), Work(8192, 2), NOBODY, there, ALL, 0.0, (RAW, HALF))
        assert (decision.codec is HALF) == (MARGIN * gbit / 8 * 1e9 < 0.65e9), gbit


def test_nothing_is_lost_where_nothing_is_known_or_sent() -> None:
    both, work = (RAW, HALF), Work(8192, 32)
    assert decide(Planner(), work, NOBODY, None, ALL, 0.0, both).codec is RAW
    assert decide(Planner("always"), work, NOBODY, None, ALL, 0.0, both).codec is RAW
    assert decide(Planner(), work, NOBODY, pair(1e6), {VLLM, MAC}, 0.0, both).codec is RAW
    assert travels(float("inf")) == "raw"
    met = decide(Planner(), Work(8192, 256), NOBODY, pair(125e6), ALL, 0.0, (RAW,))
    assert (met.strategy, met.codec) == (MEET, RAW)


def test_what_the_receiver_holds_is_a_beginning_for_the_same_codec_only() -> None:
    """A conversation goes on as it began, where what is held is worth more than the codec."""
    work = Work(8192, 32, held=8000)
    assert travels(1.0, work=work, held_in="raw") == "raw"
    assert travels(1.0, work=work, held_in="q8") == "q8"
    assert travels(1.0, work=Work(8192, 32, held=1000), held_in="raw") == "q8", "little is"
    asked = Question(work, NOBODY, pair(), ALL, (RAW, HALF), "q8")
    assert asked.in_codec(RAW).held == 0 and asked.in_codec(HALF) is work


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.floats(1.5, 6.0))
def test_noise_about_the_link_does_not_change_codecs_all_the_time(seed: int, gbit: float) -> None:
    rng, planner = random.Random(seed), Planner("always")
    found = [travels(gbit * rng.gauss(1, 0.03), planner) for _ in range(200)]
    assert sum(a != b for a, b in itertools.pairwise(found)) <= 8


def test_a_codec_follows_the_link_both_ways() -> None:
    planner = Planner("always")
    rates = [10.0] * 5 + [0.5] * 5 + [10.0] * 5
    found = [travels(rate, planner) for rate in rates]
    assert found == ["raw"] * 5 + ["q8"] * 5 + ["raw"] * 5


def test_a_decision_says_what_it_saw() -> None:
    decision = decide(Planner(), Work(8192, 32), NOBODY, pair(), {VLLM, SPLIT, MAC}, 0.0)
    assert [p.strategy for p in decision.predictions] == [VLLM, SPLIT, MAC]
    assert decision.prediction is decision.predictions[1]
    assert decision.text.startswith("split (fastest: vllm ") and decision.text.endswith(" s)")


class Noisy(Pair):
    """Its predictions are given."""

    def __init__(self, totals: dict[Strategy, float]) -> None:
        object.__setattr__(self, "totals", totals)

    def predict(self, strategy, work, load=NOBODY, codec=None):  # type: ignore[no-untyped-def]
        total = self.totals[strategy]  # type: ignore[attr-defined]
        return Prediction(strategy, 0.0, 0.0, total)


def choices(totals: list[dict[Strategy, float]]) -> list[Strategy]:
    """Of one planner, for requests of one kind."""
    planner, work = Planner(), Work(1000, 100)
    return [
        decide(planner, work, NOBODY, Noisy(each), each.keys(), float(now)).strategy
        for now, each in enumerate(totals)
    ]


def changes(found: list[Strategy]) -> int:
    return sum(a is not b for a, b in itertools.pairwise(found))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.95, 1.05), st.sampled_from([0.02, 0.05]))
def test_noise_does_not_make_it_oscillate(seed: int, ratio: float, noise: float) -> None:
    rng = random.Random(seed)
    totals = [{VLLM: rng.gauss(1, noise), SPLIT: ratio * rng.gauss(1, noise)} for _ in range(400)]
    found = choices(totals)
    alone = [min(each, key=each.__getitem__) for each in totals]
    assert changes(found) <= 8 + changes(alone) / 20


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.floats(1.2, 20), st.sampled_from([VLLM, MAC]))
def test_what_is_clearly_better_is_chosen_within_a_few_requests_for_good(
    seed: int, ratio: float, better: Strategy
) -> None:
    """Beyond the margin by more than the noise: it follows, and never returns."""
    rng = random.Random(seed)

    def noise() -> float:
        return rng.uniform(0.96, 1.04)

    before = [{SPLIT: noise(), better: ratio * noise()} for _ in range(10)]
    after = [{SPLIT: noise(), better: noise() / ratio} for _ in range(50)]
    found = choices(before + after)
    assert found[:10] == [SPLIT] * 10
    assert set(found[10 + PATIENCE - 1 :]) == {better}
    if ratio > 1.1 * CLEAR:
        assert found[10] is better, "at once"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(*[st.floats(0.1, 10)] * 4), min_size=1, max_size=40))
def test_what_is_kept_is_never_much_worse(series: list[tuple[float, ...]]) -> None:
    """Whatever happens, no request is predicted to take CLEAR times as long as it could, and of
    PATIENCE in a row one is within MARGIN of its best."""
    totals = [dict(zip(Strategy, each, strict=True)) for each in series]
    regrets = [
        each[choice] / min(each.values())
        for each, choice in zip(totals, choices(totals), strict=True)
    ]
    assert max(regrets) < CLEAR + 1e-9
    for start in range(len(regrets) - PATIENCE + 1):
        assert min(regrets[start : start + PATIENCE]) <= MARGIN


def test_kinds_do_not_disturb_each_other_and_old_choices_are_forgotten() -> None:
    planner = Planner()
    near = {VLLM: 1.0, SPLIT: 1.05}
    far = {VLLM: 1.05, SPLIT: 1.0}
    short, long = Work(100, 10), Work(100000, 10)

    def decided(work: Work, totals: dict[Strategy, float], now: float) -> tuple[Strategy, str]:
        decision = decide(planner, work, NOBODY, Noisy(totals), totals.keys(), now)
        return decision.strategy, decision.reason

    assert decided(short, near, 0.0) == (VLLM, "fastest")
    assert decided(long, far, 0.0) == (SPLIT, "fastest")
    assert decided(short, far, 1.0) == (VLLM, "kept")
    assert decided(long, near, 1.0) == (SPLIT, "kept")
    assert decided(short, far, 1000.0) == (SPLIT, "fastest")
    for size in range(1, 20000, 3):  # bounded
        decided(Work(1 << (size % 20), size, size % 7), near, 1000.0)
    assert len(planner._strategies._kept) <= 256


def test_nothing_is_computed_in_vain() -> None:
    """Splitting need only be as fast as meeting, and is left only for a clear gain."""
    equal, little, clear = ({SPLIT: 1.0, MEET: meets} for meets in (0.99, 0.95, 0.7))
    found = choices([equal, little, clear, little, equal, little])
    assert found == [SPLIT, SPLIT, MEET, MEET, SPLIT, SPLIT]


def test_no_rate_and_no_number_are_no_choice() -> None:
    nan, inf = float("nan"), float("inf")
    assert choices([{VLLM: 1.0, SPLIT: nan}, {VLLM: inf, SPLIT: 3.0}]) == [VLLM, SPLIT]
    assert choices([{VLLM: nan, SPLIT: inf}]) == [SPLIT], "as if nothing were known"


def test_predictions_that_never_come_true_are_corrected_and_tried_again() -> None:
    """What no profile knows: one way always takes twice as long as is predicted."""
    planner, work, there = Planner(), Work(1000, 100), Corrections()
    totals = {SPLIT: 1.0, MEET: 0.8}
    found = []
    for now in range(400):
        decision = decide(
            planner, work, NOBODY, Noisy(totals), totals.keys(), float(now), corrections=there
        )
        found.append(decision.strategy)
        ratio = 2.0 if decision.strategy is MEET else 1.0
        planner.turned_out(Plan(decision, work, float(now), there), ratio, float(now))
    assert found[0] is MEET and SPLIT in found[:8]
    assert 0.02 < found.count(MEET) / len(found) < 0.25, "now and then"


@pytest.mark.parametrize(
    ("work", "rate", "load", "waits"),
    [
        (Work(8192, 32), 12.5e6, NOBODY, True),  # vLLM does it, for the link's sake
        (Work(8192, 32), 12.5e6, Load(mac_rows=100), False),  # and here for the Mac's
        (Work(8192, 32, held=8000), 12.5e6, Load(vllm_seconds=60.0), False),
        (Work(8192, 256), 125e6, NOBODY, True),  # they meet
    ],
)
def test_a_faster_link_would_be_better_or_not(
    work: Work, rate: float, load: Load, waits: bool
) -> None:
    asked = Question(work, load, pair(rate), ALL)
    assert asked.waits(Planner().decide(asked, 0.0)) == waits


def test_corrections_are_each_receivers_own() -> None:
    planner, work = Planner(), Work(1000, 100)
    totals = {VLLM: 1.1, SPLIT: 1.0}
    slow, other = Corrections(), Corrections()

    def compared(corrections: Corrections) -> tuple[float, ...]:
        each = Noisy(totals), totals.keys(), 0.0
        return decide(planner, work, NOBODY, *each, corrections=corrections).totals

    decision = decide(planner, work, NOBODY, Noisy(totals), totals.keys(), corrections=slow)
    assert decision.strategy is SPLIT
    for _ in range(20):
        planner.turned_out(Plan(decision, work, 0.0, slow), 1.4, 0.0)
    assert compared(slow)[1] == pytest.approx(1.4, rel=0.01) and compared(other) == (1.1, 1.0)
    local = Decision(VLLM, "fastest", RAW, decision.predictions, decision.totals)
    for _ in range(20):
        planner.turned_out(Plan(local, work, 0.0, slow), 1.4, 0.0)
    assert compared(slow)[0] == compared(other)[0] == pytest.approx(1.54, rel=0.01), "vLLM's"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=50))
def test_corrections_are_bounded_whatever_happens(ratios: list[float]) -> None:
    corrections = Corrections()
    for now, ratio in enumerate(ratios):
        corrections.observe(SPLIT, ratio, float(now))
    assert 1 / 1.51 < corrections.factor(SPLIT, float(len(ratios))) < 1.51
    assert corrections.factor(SPLIT, 1e9) == pytest.approx(1.0)
    assert corrections.factor(MAC, 0.0) == 1.0


def test_expected_output() -> None:
    outputs = Outputs()
    assert outputs.expected(10) == 10 and outputs.expected(10**6) == 256
    for _ in range(100):
        outputs.ended(40)
    assert outputs.expected(10**6) == 40 and outputs.expected(7) == 7
    for _ in range(50):
        outputs.ended(0)
    assert 1 <= outputs.expected(10**6) < 5


def test_a_decision_takes_microseconds() -> None:
    """With every strategy and three codecs; of processor time, as machines are busy."""
    planner, there = Planner(), pair()
    codecs = (Codec(), Codec("q8", 0.53), Codec("q4", 0.28))
    work = Work(32768, 256, 100, 50)
    seconds = []
    for _ in range(20):
        began = time.thread_time()
        for _ in range(10):
            decide(planner, work, NOBODY, there, ALL, 0.0, codecs)
        seconds.append((time.thread_time() - began) / 10)
    assert min(seconds) < 200e-6 * 3, f"{1e6 * min(seconds):.0f} us"
    seconds = []
    for _ in range(20):
        began = time.thread_time()
        decide(planner, work, NOBODY, there, ALL, 0.0)
        seconds.append(time.thread_time() - began)
    assert min(seconds) < 200e-6, f"{1e6 * min(seconds):.0f} us"
