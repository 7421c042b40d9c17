"""Profiles and links as requests correct them."""

from __future__ import annotations

import math
import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_receiver.planning.live import Estimate, Factor, LinkEstimate
from mlx_receiver.wire.profile import Decode, Prefill, Profile

PROFILE = Profile(
    "a machine", "a model", Prefill(0.01, 2e-4, 1e-8, 2048), Decode(0.02, 1e-3, 1e-7),
    kv_bytes=1 << 30, bandwidth=100 << 30,
)  # fmt: skip

ratios = st.floats(0.05, 20)


def steps(estimate: Estimate, times: float, count: int, begin: float = 0.0) -> float:
    """Decode steps that take so many times what was measured."""
    for n in range(count):
        begin += 0.02 * times
        seconds = times * PROFILE.decode.seconds(500 + n, 2)
        estimate.observe_decode(500 + n, 2, seconds, begin)
    return begin


@settings(deadline=None)
@given(ratios)
def test_it_follows_a_lasting_change_within_a_few_values(times: float) -> None:
    estimate = Estimate(PROFILE)
    now = steps(estimate, 1.0, 50)
    steps(estimate, times, 8, now)
    assert estimate.profile is not None
    wanted = times * PROFILE.decode.seconds(1000, 3)
    assert estimate.profile.decode.seconds(1000, 3) == pytest.approx(wanted, rel=0.15)
    assert estimate.profile.source == "live"


@settings(deadline=None)
@given(ratios)
def test_the_two_phases_are_apart(times: float) -> None:
    estimate = Estimate(PROFILE)
    steps(estimate, times, 10)
    assert estimate.profile is not None
    assert estimate.profile.prefill == PROFILE.prefill
    for n in range(10):
        estimate.observe_prefill(512, 100, PROFILE.prefill.seconds(512, 100) / times, float(n))
    seconds = estimate.profile.prefill.seconds(2000, 0)
    assert seconds == pytest.approx(PROFILE.prefill.seconds(2000) / times, rel=0.3)
    assert estimate.profile.prefill.chunk == 2048


@settings(deadline=None)
@given(ratios, st.lists(st.sampled_from([1e-2, 1e2, 1e4]), min_size=1, max_size=2))
def test_one_or_two_values_far_away_change_nothing(times: float, far: list[float]) -> None:
    estimate = Estimate(PROFILE)
    now = steps(estimate, times, 30)
    before = estimate.profile
    for n, factor in enumerate(far):
        seconds = times * factor * PROFILE.decode.seconds(500, 2)
        estimate.observe_decode(500, 2, seconds, now + n)
    assert estimate.profile == before
    steps(estimate, times, 5, now + 5)
    assert estimate.profile is not None and before is not None
    assert estimate.profile.decode.step == pytest.approx(before.decode.step, rel=0.05)


@settings(deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 0.15))
def test_noise_does_not_move_it(seed: int, noise: float) -> None:
    rng, estimate, now, seen = random.Random(seed), Estimate(PROFILE), 0.0, []
    for n in range(200):
        now += 0.05
        seconds = PROFILE.decode.seconds(500, 1) * math.exp(rng.gauss(0, noise))
        estimate.observe_decode(500, 1, seconds, now)
        if n > 50:
            assert estimate.profile is not None
            seen.append(estimate.profile.decode.step / PROFILE.decode.step)
    assert max(abs(math.log(ratio)) for ratio in seen) < 2 * noise
    assert not estimate.distrusted


@settings(deadline=None)
@given(st.floats(0, 1e4), st.lists(st.floats(0, 500), min_size=1, max_size=30), st.data())
def test_any_clock_and_any_values(start: float, gaps: list[float], data: st.DataObject) -> None:
    factor, now = Factor(), start
    values = [data.draw(st.floats(0.5, 2.0)) for _ in gaps]
    for gap, value in zip(gaps, values, strict=True):
        now += gap
        factor.observe(value, now)
        assert min(*values, 1) / 1.001 <= factor.value <= max(*values, 1) * 1.001
    for nonsense in (0.0, -1.0, math.nan, math.inf):
        before = factor.value
        factor.observe(nonsense, now)
        assert factor.value == before


def test_what_was_seen_long_ago_weighs_less() -> None:
    near, far = Factor(), Factor()
    for factor, later in ((near, 1.0), (far, 600.0)):
        for n in range(30):
            factor.observe(1.0, n * 0.01)
        factor.observe(1.15, 0.3 + later)
    assert math.log(near.value) < 0.1 * math.log(1.15)
    assert math.log(far.value) == pytest.approx(math.log(1.15) / 2, rel=0.01)


def test_errors_are_those_of_the_corrected_profile() -> None:
    estimate = Estimate(PROFILE)
    assert estimate.error(0.5) == 0.0
    now = steps(estimate, 2.0, 1)
    assert estimate.error(0.5) == pytest.approx(0.5), "half of what it took was predicted"
    steps(estimate, 2.0, 60, now)
    assert estimate.error(0.5) < 0.01 and estimate.error(0.9) < 0.15
    assert estimate.error(0.5, "prefill") == 0.0


def test_a_profile_that_does_not_fit_is_distrusted_until_it_is_measured_again() -> None:
    estimate, rng = Estimate(PROFILE), random.Random(1)
    for n in range(60):
        times = rng.choice([0.2, 5.0])
        estimate.observe_prefill(300, 0, times * PROFILE.prefill.seconds(300), float(n))
    assert estimate.distrusted
    estimate.measured(PROFILE)
    assert not estimate.distrusted and estimate.profile == PROFILE
    steps(estimate, 4.0, 40)
    assert estimate.distrusted, "four times as long all the time"


def test_what_nothing_confirms_is_forgotten() -> None:
    """A machine that seemed slow gets no work that could tell that it is not."""
    estimate = Estimate(PROFILE)
    assert estimate.at(1e9) == PROFILE
    now = steps(estimate, 2.0, 40)
    corrected = estimate.profile
    assert corrected is not None and estimate.at(now) == corrected
    found = [estimate.at(now + later) for later in (30.0, 300.0, 3000.0)]
    seconds = [one.decode.seconds(500) for one in found if one is not None]
    was, measured = corrected.decode.seconds(500), PROFILE.decode.seconds(500)
    assert was > seconds[0] > 0.9 * was and was > seconds[1] > seconds[2]
    assert seconds[2] == pytest.approx(measured, rel=0.01)
    assert estimate.profile == corrected
    steps(estimate, 2.0, 1, now + 3000)
    assert estimate.at(now + 3000) == estimate.profile


@pytest.mark.parametrize("times", [0.3, 3.0])
def test_what_is_forgotten_comes_back_only_if_it_is_confirmed(times: float) -> None:
    """The first request in a while shows that a machine is not slow any more."""
    for again in (1.0, times, times**2):
        estimate = Estimate(PROFILE)
        now = steps(estimate, times, 40) + 900
        steps(estimate, again, 1, now)
        found = estimate.at(now + 0.1)
        assert found is not None
        # One that is slower still is far from the others.
        wanted = (again if again == 1 else times) * PROFILE.decode.seconds(500, 2)
        assert found.decode.seconds(500, 2) == pytest.approx(wanted, rel=0.1)


def test_a_profile_in_which_nothing_takes_time_says_nothing() -> None:
    for nothing in (
        msgspec.structs.replace(PROFILE, prefill=Prefill(0.0, 0.0, 0.0, 8)),
        msgspec.structs.replace(PROFILE, decode=Decode(0.0, 0.0, 0.0)),
    ):
        estimate = Estimate(nothing)
        assert estimate.profile is None and estimate.at(1.0) is None


def test_without_a_profile_nothing_is_known() -> None:
    estimate = Estimate(None)
    steps(estimate, 1.0, 5)
    assert estimate.profile is None and estimate.error(0.9) == 0.0 and not estimate.distrusted


@settings(deadline=None)
@given(st.floats(1e6, 1e11), st.floats(0, 0.05), st.floats(0.01, 100))
def test_a_link_is_followed(rate: float, round_trip: float, times: float) -> None:
    link = LinkEstimate(rate, round_trip)
    true = rate * times
    nbytes = int(true * max(1.0, 10 * round_trip))
    for n in range(10):
        link.observe(nbytes, nbytes / true + round_trip / 2, float(n))
    assert link.link.rate == pytest.approx(true, rel=0.15)
    assert link.link.round_trip == round_trip


def test_what_is_too_short_says_nothing_of_a_link() -> None:
    link = LinkEstimate(1e9, 0.01)
    for n in range(20):
        link.observe(1000, 0.0055, float(n))
    assert link.link.rate == 1e9
    unknown = LinkEstimate(0.0, 0.0)
    unknown.observe(10**9, 2.0, 0.0)
    assert unknown.link.rate == pytest.approx(5e8)
