"""How far apart next-token distributions are, of which only the likeliest tokens are known."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import nlargest
from statistics import fmean, stdev
from typing import Final

import msgspec

from vllm_mac_decode.tools.check.finding import Finding, fine, warning, wrong

#: Alternatives of each position: what both servers give at most, unless told otherwise.
TOP: Final = 20

#: Log-probabilities in nats by token id: the likeliest tokens, and the one that the text has.
Row = dict[int, float]

#: What servers round to when they leave out what is unlikely: less is not told apart from nothing.
_LEAST: Final = 1e-7
_TURNS: Final = 50

#: Nats a token by which the mean of the text's log-probabilities may be lower: 1 %, 5 %, 10 % more
#: perplexity.
_A_LITTLE, _MUCH, _TOO_MUCH = 0.01, 0.05, 0.1


@dataclass(frozen=True)
class Spot:
    """One position of a text: the token that it has there, and what the three say about it."""

    token: int
    handoff: Row
    vllm: Row
    mac: Row


def divergence(of: Row, from_: Row) -> float:
    """KL(``of`` || ``from_``) in nats: the least that fits the two rows, so never more than that
    of the whole distributions.

    The tokens are put into groups, alike for both: each that both rows have, those that only one
    has, those that only the other has, and the rest. What the other row leaves out is no likelier
    than the last of its likeliest; within that, those groups have what makes the divergence
    smallest.
    """
    shared = of.keys() & from_.keys()
    nats = [_term(math.exp(of[token]), math.exp(from_[token])) for token in shared]
    only_p, only_q = _mass(of, of.keys() - shared), _mass(from_, from_.keys() - shared)
    rest_p, rest_q = (max(0.0, 1 - _mass(row, row.keys())) for row in (of, from_))
    most_p = min(rest_p, (len(from_) - len(shared)) * _last(of))
    most_q = min(rest_q, (len(of) - len(shared)) * _last(from_))
    p, q = most_p, most_q  # of what only the other has; convex in both, so taking turns finds it
    for _ in range(_TURNS):
        if (both := only_p + rest_p - p) > 0:
            q = min(most_q, rest_q * only_p / both)
        if (both := only_q + rest_q - q) > 0:
            p = min(most_p, rest_p * only_q / both)
    nats += [_term(only_p, q), _term(p, only_q), _term(rest_p - p, rest_q - q)]
    return max(0.0, math.fsum(nats))


def _term(p: float, q: float) -> float:
    return p * math.log(p / max(q, _LEAST)) if p > _LEAST else 0.0


def _mass(row: Row, tokens: Iterable[int]) -> float:
    return math.fsum(math.exp(row[token]) for token in tokens)


def _last(row: Row) -> float:
    """The probability of the last of the ``TOP`` likeliest; the text's token may be behind it."""
    return math.exp(nlargest(TOP, row.values())[-1])


def known(of: Row, from_: Row) -> float:
    """The probability that the first gives to the tokens that both know, from 0 to 1."""
    return min(1.0, _mass(of, of.keys() & from_.keys()))


def likeliest(row: Row) -> int:
    """Its token; the lowest of those that are as likely."""
    return min(row, key=lambda token: (-row[token], token))


class Between(msgspec.Struct, frozen=True, kw_only=True):
    """From one way of computing the same positions to another.

    ``mean_kl`` is in nats, ``error`` its standard error, ``worst_kl`` that of the worst position;
    ``same_top_token`` and ``known`` are shares from 0 to 1.
    """

    mean_kl: float
    error: float
    worst_kl: float
    same_top_token: float
    known: float


class Perplexity(msgspec.Struct, frozen=True, kw_only=True):
    """Of the text, by each way; the differences are hand-off minus engine alone.

    ``over_vllm`` and ``over_mac`` are the same in nats a token, the logarithm of the ratio, with
    the standard errors of the paired differences.
    """

    handoff: float
    vllm: float
    mac: float
    difference_vllm: float
    difference_mac: float
    over_vllm: float
    over_vllm_error: float
    over_mac: float
    over_mac_error: float


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What so many ``positions`` give. ``engines`` is the Mac alone against vLLM alone: how far
    apart they are without any hand-off. ``perplexity`` is None where no text was given."""

    positions: int
    handoff_from_vllm: Between
    handoff_from_mac: Between
    engines: Between
    perplexity: Perplexity | None = None


def figures(spots: Sequence[Spot], with_perplexity: bool) -> Figures:
    """All of it; at least one spot."""
    return Figures(
        positions=len(spots),
        handoff_from_vllm=_between([(s.vllm, s.handoff) for s in spots]),
        handoff_from_mac=_between([(s.mac, s.handoff) for s in spots]),
        engines=_between([(s.vllm, s.mac) for s in spots]),
        perplexity=_perplexity(spots) if with_perplexity else None,
    )


def verdict(found: Figures) -> Finding:
    """What the perplexities mean; differences within two standard errors mean nothing."""
    p = found.perplexity
    assert p is not None
    said = (
        f"Perplexity {p.handoff:.2f} handed off, {p.vllm:.2f} by vLLM alone, {p.mac:.2f} by the "
        "Mac alone"
    )
    # Against the engine that does worse by itself.
    over, error = min((p.over_vllm, p.over_vllm_error), (p.over_mac, p.over_mac_error))
    if over > _TOO_MUCH and over > 2 * error:
        return wrong(
            "quality",
            f"{said}: handing off costs much more than the Mac's weights do",
            "Are both sides the same model and revision? If they are, please report it",
        )
    if over > _A_LITTLE and over > 2 * error:
        return warning(
            "quality",
            f"{said}: a hand-off is somewhat worse than either engine alone",
            "Nothing, if that is little enough for you; else weights of more bits on the Mac",
        )
    if p.over_vllm > _MUCH and p.over_vllm > 2 * p.over_vllm_error:
        return warning(
            "quality",
            f"{said}: a hand-off loses no more than the Mac's weights do",
            "Nothing, if that is little enough for you; else weights of more bits on the Mac",
        )
    return fine("quality", f"{said}: a hand-off is as good as the engines are alone")


def _between(pairs: Sequence[tuple[Row, Row]]) -> Between:
    nats = [divergence(of, from_) for of, from_ in pairs]
    return Between(
        mean_kl=fmean(nats),
        error=_error(nats),
        worst_kl=max(nats),
        same_top_token=fmean(likeliest(of) == likeliest(from_) for of, from_ in pairs),
        known=fmean(known(of, from_) for of, from_ in pairs),
    )


def _perplexity(spots: Sequence[Spot]) -> Perplexity:
    handoff, vllm, mac = (
        [row[spot.token] for spot, row in zip(spots, rows, strict=True)]
        for rows in (
            [s.handoff for s in spots],
            [s.vllm for s in spots],
            [s.mac for s in spots],
        )
    )
    values = [math.exp(-fmean(logs)) for logs in (handoff, vllm, mac)]
    over_vllm = [alone - there for alone, there in zip(vllm, handoff, strict=True)]
    over_mac = [alone - there for alone, there in zip(mac, handoff, strict=True)]
    return Perplexity(
        handoff=values[0],
        vllm=values[1],
        mac=values[2],
        difference_vllm=values[0] - values[1],
        difference_mac=values[0] - values[2],
        over_vllm=fmean(over_vllm),
        over_vllm_error=_error(over_vllm),
        over_mac=fmean(over_mac),
        over_mac_error=_error(over_mac),
    )


def _error(values: Sequence[float]) -> float:
    """The standard error of the mean, as if the positions were independent."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
