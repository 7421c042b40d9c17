"""Numbers from timed forwards: what they were made from comes out again."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_receiver.planning.fit import (
    DecodeSample,
    PrefillSample,
    fit_decode,
    fit_prefill,
)
from mlx_receiver.wire.profile import Decode, Prefill

LENGTHS = [(16, 0), (64, 0), (256, 0), (512, 0), (512, 1024), (2048, 0), (2048, 2048), (4096, 0)]
BATCHES = [(64, 1), (1024, 1), (2048, 1), (64, 4), (1024, 4), (64, 8), (512, 8)]

#: Seconds from a tenth of a microsecond on, or none at all.
steps = st.one_of(st.just(0.0), st.floats(1e-4, 1.0))
tokens = st.floats(1e-6, 1e-2)
pairs = st.one_of(st.just(0.0), st.floats(1e-10, 1e-6))

prefills = st.builds(Prefill, steps, tokens, pairs, st.sampled_from([512, 2048, 8192]))
decodes = st.builds(Decode, st.floats(1e-4, 1.0), steps, st.floats(0, 1e-5))


def prefilled(true: Prefill) -> list[PrefillSample]:
    return [PrefillSample(n, c, true.seconds(n, c)) for n, c in LENGTHS]


def decoded(true: Decode) -> list[DecodeSample]:
    return [DecodeSample(c, r, true.seconds(c, r)) for c, r in BATCHES]


@settings(deadline=None)
@given(prefills)
def test_a_prefill_is_found_again(true: Prefill) -> None:
    fit = fit_prefill(prefilled(true), true.chunk)
    assert fit is not None and fit.worst < 1e-6
    for new, context in ((100, 0), (1000, 3000), (10_000, 0)):
        assert fit.found.seconds(new, context) == pytest.approx(
            true.seconds(new, context), rel=1e-3
        )


@settings(deadline=None)
@given(decodes)
def test_a_decode_is_found_again(true: Decode) -> None:
    fit = fit_decode(decoded(true))
    assert fit is not None and fit.worst < 1e-6
    for context, rows in ((10, 1), (4000, 1), (1000, 6)):
        assert fit.found.seconds(context, rows) == pytest.approx(
            true.seconds(context, rows), rel=1e-3
        )


@settings(deadline=None)
@given(decodes, st.integers(0, len(BATCHES) - 1), st.floats(2, 100))
def test_one_disturbed_step_moves_nothing(true: Decode, which: int, times: float) -> None:
    """Each is timed twice: whatever became of one of them, the other says what is true."""
    samples = decoded(true) * 2
    context, rows, seconds = samples[which]
    samples[which] = DecodeSample(context, rows, seconds * times)
    fit = fit_decode(samples)
    assert fit is not None and fit.error < 1e-3
    for context, rows in ((64, 1), (2048, 1), (1024, 4)):
        assert fit.found.seconds(context, rows) == pytest.approx(
            true.seconds(context, rows), rel=0.02
        )
    assert fit.worst > 0.4, "that it does not fit is said"


@settings(deadline=None)
@given(
    st.lists(
        st.builds(PrefillSample, st.integers(1, 5000), st.integers(0, 5000), st.floats(1e-5, 100)),
        max_size=12,
    )
)
def test_none_is_below_zero_whatever_was_measured(samples: list[PrefillSample]) -> None:
    fit = fit_prefill(samples, 2048)
    assert (fit is None) == (not samples)
    if fit is not None:
        assert min(fit.found.step, fit.found.token, fit.found.pair) >= 0
        assert 0 <= fit.error <= fit.worst


@settings(deadline=None)
@given(prefills, st.floats(0.01, 100))
def test_a_machine_that_is_twice_as_slow(true: Prefill, times: float) -> None:
    samples = prefilled(true)
    slower = [PrefillSample(s.new, s.context, s.seconds * times) for s in samples]
    one, other = fit_prefill(samples, true.chunk), fit_prefill(slower, true.chunk)
    assert one is not None and other is not None
    assert other.found.seconds(3000) == pytest.approx(times * one.found.seconds(3000), rel=1e-3)


def test_what_is_no_time_is_left_out() -> None:
    true = Decode(0.01, 0.001, 1e-7)
    nonsense = [DecodeSample(64, 1, s) for s in (0.0, -1.0, float("nan"), float("inf"), 2e6)] + [
        DecodeSample(-1, 1, 1.0),
        DecodeSample(64, 0, 1.0),
    ]
    assert fit_decode(nonsense) is None
    fit = fit_decode([*nonsense, *decoded(true)])
    assert fit is not None and fit.found.seconds(500, 2) == pytest.approx(true.seconds(500, 2))
