"""The mathematics of `mac-decode check --quality`, and what it makes of it in words."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vllm_mac_decode.tools.quality.figures import (
    Row,
    Spot,
    divergence,
    figures,
    known,
    likeliest,
    verdict,
)

EVEN = {0: 0.5, 1: 0.5}


def row(probabilities: dict[int, float]) -> Row:
    return {token: math.log(p) for token, p in probabilities.items()}


def top(logs: np.ndarray, count: int) -> Row:
    return {int(token): float(logs[token]) for token in np.argsort(-logs)[:count]}


def test_divergence_of_whole_distributions_is_the_known_formula() -> None:
    p, q = row({0: 0.7, 1: 0.2, 2: 0.1}), row({0: 0.5, 1: 0.25, 2: 0.25})
    expected = 0.7 * math.log(0.7 / 0.5) + 0.2 * math.log(0.2 / 0.25) + 0.1 * math.log(0.1 / 0.25)
    assert divergence(p, q) == pytest.approx(expected)
    assert divergence(q, p) != pytest.approx(expected)
    assert divergence(p, p) == 0


def test_it_is_the_least_that_fits_what_is_listed() -> None:
    """By trying out how likely each may find the token that only the other lists, up to the least
    likely one that it lists itself."""
    p, q = row({0: 0.6, 1: 0.1}), row({0: 0.3, 2: 0.2})

    def whole(p2: float, q1: float) -> float:
        pairs = ((0.6, 0.3), (0.1, q1), (p2, 0.2), (0.3 - p2, 0.5 - q1))
        return sum(a * math.log(a / b) for a, b in pairs)

    steps = np.linspace(1e-3, 1, 200)
    least = min(whole(0.1 * a, 0.2 * b) for a in steps for b in steps)
    assert divergence(p, q) == pytest.approx(least, abs=1e-3)
    assert known(p, q) == pytest.approx(0.6)


def test_lists_without_a_common_token_are_far_apart() -> None:
    logs = math.log(0.04)
    first, second = ({start + i: logs for i in range(20)} for start in (0, 100))
    assert divergence(first, second) > 0.5
    assert known(first, second) == 0


def test_a_part_never_shows_more_than_the_whole() -> None:
    source = np.random.default_rng(0)
    for scale in (0.01, 0.3, 3.0):
        logits = source.standard_normal(500) * 3
        p, q = logits, logits + scale * source.standard_normal(500)
        p, q = (x - np.log(np.exp(x).sum()) for x in (p, q))
        whole = float((np.exp(p) * (p - q)).sum())
        part = divergence(top(p, 20), top(q, 20))
        assert 0 < part <= whole
        assert divergence(top(p, 500), top(q, 500)) == pytest.approx(whole, rel=1e-2)


def test_nothing_and_rounding_are_finite() -> None:
    """Servers write -9999 for what cannot come, and float32 sums are a little over 1."""
    assert divergence({0: 0.0, 1: -9999.0}, {0: 0.0, 1: -9999.0}) == 0
    assert divergence({0: 1e-7, 1: -30.0}, {0: 0.0, 1: -30.0}) < 1e-6
    impossible = divergence({0: 0.0}, {0: -9999.0})
    assert 10 < impossible < math.inf


def test_the_likeliest_of_equals_is_the_lowest() -> None:
    assert likeliest({7: -1.0, 3: -0.5, 2: -0.5}) == 2


def test_figures_of_two_positions() -> None:
    skewed = {0: 0.8, 1: 0.2}
    spots = [
        Spot(0, row(EVEN), row(skewed), row(EVEN)),
        Spot(1, row(EVEN), row(EVEN), row({0: 0.25, 1: 0.75})),
    ]
    found = figures(spots, with_perplexity=True)
    apart = divergence(row(skewed), row(EVEN))
    assert found.positions == 2
    assert found.handoff_from_vllm.mean_kl == pytest.approx(apart / 2)
    assert found.handoff_from_vllm.error == pytest.approx(apart / 2)  # of two: half the range
    assert found.handoff_from_vllm.worst_kl == pytest.approx(apart)
    assert found.handoff_from_vllm.same_top_token == 1.0
    assert found.handoff_from_mac.same_top_token == 0.5
    assert found.handoff_from_mac.known == pytest.approx(1)
    p = found.perplexity
    assert p is not None
    assert p.handoff == pytest.approx(2)
    assert p.vllm == pytest.approx(1 / math.sqrt(0.8 * 0.5))
    assert p.mac == pytest.approx(1 / math.sqrt(0.5 * 0.75))
    assert p.difference_vllm == pytest.approx(p.handoff - p.vllm)
    assert p.over_vllm == pytest.approx(math.log(p.handoff / p.vllm))
    assert p.over_mac == pytest.approx(math.log(p.handoff / p.mac))
    assert figures(spots, with_perplexity=False).perplexity is None


@pytest.mark.parametrize(
    ("vllm", "mac", "handoff", "state", "words"),
    [
        (0.5, 0.5, 0.5, "fine", "as good as the engines are alone"),
        (0.5, 0.4, 0.49, "fine", "as good"),
        (0.5, 0.4, 0.42, "warning", "loses no more than the Mac's weights do"),
        (0.5, 0.45, 0.43, "warning", "somewhat worse than either engine alone"),
        (0.5, 0.5, 0.4, "wrong", "costs much more"),
    ],
)
def test_verdicts(vllm: float, mac: float, handoff: float, state: str, words: str) -> None:
    """Of the probabilities that each way gives to the text's tokens, with a little noise."""
    noise = np.random.default_rng(0).uniform(0.99, 1.01, (40, 3))
    spots = [
        Spot(
            0,
            *(row({0: p * n, 1: 1 - p * n}) for p, n in zip((handoff, vllm, mac), ns, strict=True)),
        )
        for ns in noise
    ]
    found = verdict(figures(spots, with_perplexity=True))
    assert (found.state, words in found.seen) == (state, True), found.seen
    assert bool(found.remedy) == (state != "fine")


def test_a_difference_within_its_error_means_nothing() -> None:
    spots = [
        Spot(0, row({0: p, 1: 1 - p}), row(EVEN), row(EVEN)) for p in (0.1, 0.9, 0.15, 0.85, 0.2)
    ]
    assert verdict(figures(spots, with_perplexity=True)).state == "fine"
