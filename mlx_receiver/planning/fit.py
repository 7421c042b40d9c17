"""A profile's numbers from timed forwards.

The three numbers of a phase are those, none of them below zero, with which the errors are smallest:
the logarithms of predicted by measured, so that half as much is as wrong as twice as much. Errors
count by their size and not by its square: a forward that something disturbed takes much longer than
the others and must not move the result.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final, Generic, NamedTuple, TypeVar

import numpy as np

from mlx_receiver.wire.profile import Decode, Prefill

#: Rounds in which errors are weighed anew.
_ROUNDS: Final = 50
#: An error below this is as good as none: clocks and schedulers make as much. No less than that
#: share of what was measured is taken for predicted.
_FLOOR: Final = 1e-3
_LEAST: Final = 1e-3

_Kind = TypeVar("_Kind", Prefill, Decode)


class PrefillSample(NamedTuple):
    """A prefill of ``new`` tokens behind ``context`` others."""

    new: int
    context: int
    seconds: float


class DecodeSample(NamedTuple):
    """A decode step of ``rows`` texts of ``context`` tokens each."""

    context: int
    rows: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Fit(Generic[_Kind]):
    """What was found, and how far it is from what was measured: the median and the largest of the
    relative errors."""

    found: _Kind
    error: float
    worst: float


def fit_prefill(samples: Sequence[PrefillSample], chunk: int) -> Fit[Prefill] | None:
    """None where the samples say nothing. ``chunk``: tokens of one step, at the most."""
    good = [s for s in samples if s.new > 0 and s.context >= 0 and _is_time(s.seconds)]
    if not good:
        return None
    rows = [(math.ceil(s.new / chunk), s.new, s.new * s.context + s.new * s.new / 2) for s in good]
    step, token, pair = _smallest(rows, [s.seconds for s in good])
    found = Prefill(step, token, pair, chunk)
    return Fit(found, *_errors([(found.seconds(s.new, s.context), s.seconds) for s in good]))


def fit_decode(samples: Sequence[DecodeSample]) -> Fit[Decode] | None:
    """None where the samples say nothing."""
    good = [s for s in samples if s.context >= 0 and s.rows > 0 and _is_time(s.seconds)]
    if not good:
        return None
    rows = [(1.0, s.rows, s.rows * s.context) for s in good]
    step, row, context = _smallest(rows, [s.seconds for s in good])
    found = Decode(step, row, context)
    return Fit(found, *_errors([(found.seconds(s.context, s.rows), s.seconds) for s in good]))


def _is_time(seconds: float) -> bool:
    return math.isfinite(seconds) and 0 < seconds < 1e6


def _errors(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    errors = [abs(predicted / measured - 1) for predicted, measured in pairs]
    return median(errors), max(errors)


def _smallest(rows: Sequence[tuple[float, ...]], seconds: Sequence[float]) -> list[float]:
    """The numbers, none below zero, whose products with the rows are nearest to the seconds."""
    relative = np.array(rows, float) / np.array(seconds, float)[:, None]
    scale = relative.max(axis=0)
    scale[scale == 0] = 1.0
    relative = relative / scale
    weights = np.ones(len(relative))
    found = np.zeros(relative.shape[1])
    for _ in range(_ROUNDS):
        before, found = found, _least_squares(relative, weights)
        if np.allclose(before, found, rtol=1e-9, atol=0):
            break
        # With these weights the squares add up to the errors' sizes.
        predicted = np.maximum(relative @ found, _LEAST)
        errors = np.maximum(np.abs(np.log(predicted)), _FLOOR)
        weights = np.sqrt(errors) / np.maximum(np.abs(predicted - 1), _FLOOR)
    return [float(number) for number in found / scale]


def _least_squares(rows: Any, weights: Any) -> Any:
    """Each set of numbers that may be above zero is tried: with three there are seven."""
    weighted = rows * weights[:, None]
    best, least = np.zeros(rows.shape[1]), math.inf
    columns = range(rows.shape[1])
    for size in range(1, len(columns) + 1):
        for chosen in itertools.combinations(columns, size):
            part = list(chosen)
            solution = np.linalg.lstsq(weighted[:, part], weights, rcond=None)[0]
            if (solution < 0).any():
                continue
            error = float(np.square(weighted[:, part] @ solution - weights).sum())
            if error < least - 1e-15:
                best, least = np.zeros(rows.shape[1]), error
                best[part] = solution
    return best
