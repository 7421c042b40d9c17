"""What requests say of a profile and of a link: the same numbers, corrected while they are used.

A profile is measured once; since then the machine may have become hot, or have other work. What
requests take is compared with what was predicted, and each phase is scaled by the running mean of
the ratio's logarithm. One value far from the others changes nothing, several of them in a row do at
once. What was seen long ago weighs little beside what is seen now.

Pure arithmetic, for any one thread at a time.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable
from typing import Final

import msgspec

from mlx_receiver.planning.cost import Link
from mlx_receiver.wire.profile import Decode, Prefill, Profile
from mlx_receiver.wire.quantised import BITS

#: Values that the mean is taken of when they come one after the other, and the seconds in which
#: their weight falls to a third.
_VALUES: Final = 20
_SECONDS: Final = 60.0
#: Values that the profile itself counts for in the beginning.
_BEFORE: Final = 2.0
#: A value is far from the others beyond this many times their usual distance from the mean, which
#: is at least that much; so many in a row are no accident.
_FAR: Final = 4.0
_LEAST_SPREAD: Final = 0.05
_IN_A_ROW: Final = 3
#: A ratio beyond this, or its inverse, is counted as this.
_MOST: Final = 1e3
#: Seconds without a value in which what was seen is forgotten, to a third: a machine that seemed
#: slow gets no work that could tell that it is not.
_UNUSED_SECONDS: Final = 300.0
#: Predictions whose errors are remembered.
_REMEMBERED: Final = 128
#: After so many predictions: a profile is distrusted whose median error is beyond the first of
#: these, or that has to be corrected by more than the second.
_ENOUGH: Final = 24
_MOST_ERROR: Final = 0.4
_MOST_FACTOR: Final = 3.0

#: Predictions that are so little apart, relatively, are as good as the same.
_ALIKE: Final = 0.05

#: Rates of quantising that are so little apart are.
_ALIKE_CODING: Final = 0.2

#: A transfer tells about the rate if it takes so many round trips.
_ROUND_TRIPS: Final = 2.0


class Factor:
    """A running mean of ratios (the mean of their logarithms)."""

    def __init__(self, before: float = _BEFORE) -> None:
        """``before``: values that the first mean, 1, counts for."""
        self._level = 0.0
        self._weight = self._before = before
        self._spread = _LEAST_SPREAD
        self._far: list[float] = []
        self._at: float | None = None

    @property
    def value(self) -> float:
        """The mean."""
        return math.exp(self._level)

    def at(self, now: float) -> float:
        """What is left of it, if that is later than the last value."""
        passed = max(0.0, now - self._at) if self._at is not None else 0.0
        return math.exp(self._level * math.exp(-passed / _UNUSED_SECONDS))

    def forget(self, ratio: float, now: float) -> None:
        """Give up of what ``at`` has forgotten as much as the next value contradicts: else that
        would bring it back."""
        if self._at is None or now < self._at + _UNUSED_SECONDS or not ratio > 0:
            return
        least, most = sorted((self.value, self.at(now)))
        self._level = math.log(min(max(ratio, least), most))

    def observe(self, ratio: float, now: float) -> None:
        """One more value, seen at ``now`` seconds of any clock that does not go back."""
        if not (math.isfinite(ratio) and ratio > 0):
            return
        log = math.log(min(max(ratio, 1 / _MOST), _MOST))
        if self._at is not None:
            # It becomes worth no less than one value, so that the next one never decides alone.
            passed = max(0.0, now - self._at)
            self._weight = max(min(1.0, self._weight), self._weight * math.exp(-passed / _SECONDS))
        self._at = max(now, self._at) if self._at is not None else now
        distance = log - self._level
        if abs(distance) > _FAR * self._spread:
            if self._far and (self._far[-1] > 0) != (distance > 0):
                self._far.clear()
            self._far.append(distance)
            if len(self._far) < _IN_A_ROW:
                return
            # It has changed: the middle one of them says by how much.
            self._level += sorted(self._far)[len(self._far) // 2]
            self._weight, self._spread = float(_IN_A_ROW), _LEAST_SPREAD
            self._far.clear()
            return
        self._far.clear()
        self._weight = min(self._weight + 1, _VALUES)
        self._level += distance / self._weight
        self._spread += (max(abs(distance), _LEAST_SPREAD) - self._spread) / _VALUES


class Errors:
    """How far predictions were from what came, the latest of them."""

    def __init__(self) -> None:
        self._errors: deque[float] = deque(maxlen=_REMEMBERED)

    def __len__(self) -> int:
        return len(self._errors)

    def add(self, predicted: float, actual: float) -> None:
        """One that has come true, or not."""
        self._errors.append(abs(predicted / actual - 1))

    def quantile(self, quantile: float) -> float:
        """0 while there is none."""
        if not self._errors:
            return 0.0
        ordered = sorted(self._errors)
        return ordered[min(len(ordered) - 1, int(quantile * len(ordered)))]


class Estimate:
    """One side's profile as it is at present."""

    def __init__(self, profile: Profile | None) -> None:
        self._begin(profile)

    def _begin(self, profile: Profile | None) -> None:
        if profile is not None and not (
            profile.prefill.seconds(1) > 0 and profile.decode.seconds(1) > 0
        ):
            profile = None  # nothing takes no time: it says nothing
        self._measured = profile
        self._prefill, self._decode = Factor(), Factor()
        self._errors = {"prefill": Errors(), "decode": Errors()}
        self._current = profile

    def measured(self, profile: Profile | None) -> None:
        """It was measured anew."""
        self._begin(profile)

    @property
    def profile(self) -> Profile | None:
        """Corrected by what was observed; None while nothing was ever measured."""
        return self._current

    def at(self, now: float) -> Profile | None:
        """The same, where nothing may have been observed for long: back to what was measured."""
        if self._measured is None or self._current is self._measured:
            return self._current
        return _scaled(self._measured, self._prefill.at(now), self._decode.at(now))

    def error(self, quantile: float, phase: str = "") -> float:
        """Of the latest predictions of a ``phase`` ("prefill", "decode"), else of all: the relative
        error that so large a share of them stays within; 0 while there are none."""
        if phase:
            return self._errors[phase].quantile(quantile)
        return max(errors.quantile(quantile) for errors in self._errors.values())

    @property
    def distrusted(self) -> bool:
        """Whether what comes is so far from what was measured that it should be measured again."""
        return any(
            len(errors) >= _ENOUGH
            and (
                errors.quantile(0.5) > _MOST_ERROR
                or not 1 / _MOST_FACTOR < factor.value < _MOST_FACTOR
            )
            for errors, factor in (
                (self._errors["prefill"], self._prefill),
                (self._errors["decode"], self._decode),
            )
        )

    def observe_prefill(
        self, new: int, context: int, seconds: float, now: float | None = None
    ) -> None:
        """``new`` tokens behind ``context`` others were prefilled, and nothing else meanwhile."""
        if self._measured is not None and new > 0 and context >= 0:
            predicted = self._measured.prefill.seconds(new, context)
            self._observe("prefill", self._prefill, predicted, seconds, now)

    def observe_decode(
        self, context: int, rows: int, seconds: float, now: float | None = None
    ) -> None:
        """One decode step of ``rows`` texts of ``context`` tokens each, and nothing else."""
        if self._measured is not None and context >= 0 and rows > 0:
            predicted = self._measured.decode.seconds(context, rows)
            self._observe("decode", self._decode, predicted, seconds, now)

    def _observe(
        self, phase: str, factor: Factor, predicted: float, seconds: float, now: float | None
    ) -> None:
        if not (math.isfinite(seconds) and seconds > 0 and predicted > 0):
            return
        self._errors[phase].add(factor.value * predicted, seconds)
        now = time.monotonic() if now is None else now
        factor.forget(seconds / predicted, now)
        factor.observe(seconds / predicted, now)
        assert self._measured is not None
        self._current = _scaled(self._measured, self._prefill.value, self._decode.value)


class LinkEstimate:
    """What a link carries at present."""

    def __init__(self, rate: float, round_trip: float) -> None:
        """As it was measured in the beginning: bytes a second, and seconds."""
        self._rate, self._round_trip = rate, round_trip
        self._factor = Factor()
        self._errors = Errors()

    @property
    def link(self) -> Link:
        """As the cost model wants it."""
        return Link(self._rate * self._factor.value, self._round_trip)

    def error(self, quantile: float) -> float:
        """Of the latest transfers: the relative error that so large a share stays within."""
        return self._errors.quantile(quantile)

    def observe(self, nbytes: float, seconds: float, now: float | None = None) -> None:
        """So many bytes took so long, from the first one's departure to the last one's arrival,
        while the link had nothing else to do and never waited for them. What is too short to tell
        is ignored."""
        if not (math.isfinite(seconds) and seconds > 0 and nbytes > 0):
            return
        if self._rate <= 0:  # it was never measured
            self._rate = nbytes / seconds
        moving = seconds - self._round_trip / 2
        if moving < _ROUND_TRIPS * self._round_trip or moving <= 0:
            return
        self._errors.add(nbytes / self.link.rate + self._round_trip / 2, seconds)
        now = time.monotonic() if now is None else now
        self._factor.observe(nbytes / moving / self._rate, now)


def alike(one: Profile, other: Profile | None) -> bool:
    """Whether they predict nearly the same, so that nobody needs to be told of the change."""
    if other is None or (one.device, one.model) != (other.device, other.model):
        return False
    if (one.source == "live") != (other.source == "live") or one.kv_bytes != other.kv_bytes:
        return False
    pairs = [
        (one.prefill.seconds(new, context), other.prefill.seconds(new, context))
        for new, context in ((128, 0), (2048, 0), (128, 8192))
    ]
    pairs += [
        (one.decode.seconds(context, rows), other.decode.seconds(context, rows))
        for context, rows in ((128, 1), (8192, 1), (128, 8))
    ]
    mine, others = one.coding, other.coding
    rates = [(mine.rate(codec), others.rate(codec)) for codec in BITS]
    rates.append((mine.threads, others.threads))
    return _near(pairs, _ALIKE) and _near(rates, _ALIKE_CODING)


def _near(pairs: Iterable[tuple[float, float]], most: float) -> bool:
    return all(abs(a - b) <= most * max(a, b) for a, b in pairs)


def _scaled(profile: Profile, prefill: float, decode: float) -> Profile:
    p, d = profile.prefill, profile.decode
    # Decoding reads as many bytes, in another time.
    bandwidth = int(profile.bandwidth / decode)
    return msgspec.structs.replace(
        profile,
        prefill=Prefill(p.step * prefill, p.token * prefill, p.pair * prefill, p.chunk),
        decode=Decode(d.step * decode, d.row * decode, d.context * decode),
        source="live",
        bandwidth=min(bandwidth, 2**63 - 1),
    )
