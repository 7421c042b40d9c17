"""Who should do what of a request, and how its KV travels: the cost model's answer.

Data and arithmetic only, so that it takes microseconds: nothing waits for a plan. Of requests of
one kind (as long, with as much of it held on each side) the last choice stays unless another one is
better by a margin (``choices``): predictions are noisy, and what is chosen in turns with something
else has each other's caches cold.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from mlx_receiver.planning.cost import RAW, Codec, Link, Load, Pair, Prediction, Strategy, Work
from vllm_mac_decode.scheduler.choices import EQUAL, MARGIN, Choices

#: What less work is done by is preferred to what is as fast: computing a front on the receiver,
#: say, that the stream would bring as soon.
_PREFERRED: Final = (Strategy.SPLIT, Strategy.MAC, Strategy.VLLM, Strategy.MEET)

#: How predictions of one strategy are corrected by what became of the last ones: the share that
#: one counts for, the most that it is taken for, the most that they are corrected by, and the
#: seconds in which that falls to a third, so that a strategy that was left is tried again.
_ONE: Final = 0.25
_MOST_RATIO: Final = 2.0
_MOST_CORRECTION: Final = 1.5
_FORGET_SECONDS: Final = 60.0

#: Output tokens that are expected before any text has ended, and texts that the mean is of.
_FIRST_OUTPUT: Final = 256.0
_MEMORY: Final = 16

#: Why a strategy was chosen, as a metric label: the setting ``offload`` says so, or the request
#: itself; nothing else can be done; the prompt has too few new tokens; no profile is known; it is
#: predicted to be the fastest; it was that for the last requests of this kind, and is not clearly
#: slower.
Reason = Literal["setting", "request", "only", "threshold", "unknown", "fastest", "kept"]

#: What is done whatever is predicted, by the setting's and a request's word for it.
FIXED: Final = {
    "always": Strategy.SPLIT,
    "never": Strategy.VLLM,
    "mac": Strategy.MAC,
    "meet": Strategy.MEET,
}


@dataclass(frozen=True, slots=True)
class Decision:
    """What is done, why, and what was predicted: of each strategy that was possible, its best."""

    strategy: Strategy
    reason: Reason
    codec: Codec = RAW
    predictions: tuple[Prediction, ...] = ()
    #: The seconds of each that were compared: corrected, see ``Corrections``.
    totals: tuple[float, ...] = ()

    @property
    def prediction(self) -> Prediction | None:
        """Of what was chosen; None where nothing was predicted."""
        return next((p for p in self.predictions if p.strategy is self.strategy), None)

    @property
    def text(self) -> str:
        """For people."""
        codec = f" {self.codec.name}" if self.codec.name != RAW.name else ""
        if not self.predictions:
            return f"{self.strategy}{codec} ({self.reason})"
        compared = zip(self.predictions, self.totals, strict=True)
        totals = ", ".join(f"{p.strategy} {total:.2f} s" for p, total in compared)
        return f"{self.strategy}{codec} ({self.reason}: {totals})"


class Corrections:
    """How much longer requests took than was predicted, by strategy. Estimates follow each machine
    and the link; this is for what no profile knows, as two threads that want the same processor."""

    def __init__(self) -> None:
        self._logs: dict[Strategy, tuple[float, float]] = {}

    def observe(self, strategy: Strategy, ratio: float, now: float) -> None:
        """One request took so many times as long as was predicted, without correction."""
        if not (math.isfinite(ratio) and ratio > 0):
            return
        most, limit = math.log(_MOST_RATIO), math.log(_MOST_CORRECTION)
        log = max(-most, min(most, math.log(ratio)))
        before = self._log(strategy, now)
        after = before + _ONE * (log - before)
        self._logs[strategy] = max(-limit, min(limit, after)), now

    def factor(self, strategy: Strategy, now: float) -> float:
        """What predictions are multiplied by."""
        return math.exp(self._log(strategy, now))

    def _log(self, strategy: Strategy, now: float) -> float:
        log, at = self._logs.get(strategy, (0.0, now))
        return log * math.exp(-max(0.0, now - at) / _FORGET_SECONDS)


@dataclass(frozen=True, slots=True)
class Question:
    """What is known of one request."""

    work: Work
    load: Load
    pair: Pair | None  # both sides and the way between; None for too little
    allowed: Collection[Strategy]  # what can be done with it
    #: How its KV may travel where all of it does, what loses least first; and how what the receiver
    #: holds did: it is a beginning for the same only.
    codecs: Sequence[Codec] = (RAW,)
    held_in: str = RAW.name
    corrections: Corrections = field(default_factory=Corrections)
    #: What it says itself.
    ordered: Strategy | None = None

    def in_codec(self, codec: Codec) -> Work:
        """The work, where its KV travels so."""
        return self.work if codec.name == self.held_in else replace(self.work, held=0)

    def waits(self, decision: Decision) -> bool:
        """Whether the request would be done sooner if the link were faster. Needs ``pair``."""
        assert self.pair is not None
        chosen = decision.prediction
        if chosen is None or Strategy.SPLIT not in self.allowed:
            return chosen is None
        ideal = replace(self.pair, link=Link(math.inf, self.pair.link.round_trip))
        work = self.in_codec(RAW)
        return ideal.predict(Strategy.SPLIT, work, self.load).total < chosen.total

    def predict(self, strategy: Strategy, codec: Codec) -> Prediction:
        """Needs ``pair``."""
        assert self.pair is not None
        return self.pair.predict(strategy, self.in_codec(codec), self.load, codec)


@dataclass(eq=False, slots=True)
class Plan:
    """One request's: what was decided, from what, and how far it has come."""

    decision: Decision
    work: Work
    at: float  # its arrival, ``time.monotonic()``
    corrections: Corrections
    #: Tokens that the receiver would hold if it had kept everything.
    expected: int = 0
    #: Bytes a second that the link was taken to carry.
    rate: float = 0.0
    #: Whether it may end by a stop string, which vLLM's engine sees as given up.
    stops: bool = False
    #: Of its output, where vLLM does all of it.
    tokens: int = 0

    def error(self, tokens: int, now: float) -> float | None:
        """How long the request took, over what was predicted of one with so many tokens."""
        prediction = self.decision.prediction
        if prediction is None or tokens < 2:
            return None
        each = (prediction.total - prediction.second_token) / max(1, self.work.output - 2)
        predicted = prediction.second_token + max(0.0, each) * (tokens - 2)
        error = (now - self.at) / predicted if predicted > 0 else math.inf
        return error if math.isfinite(error) else None


class Outputs:
    """How long texts get: the mean of the last ones."""

    def __init__(self) -> None:
        self._mean, self._texts = _FIRST_OUTPUT, 0

    def ended(self, tokens: int) -> None:
        """A text has ended by itself or at its limit."""
        self._texts = min(self._texts + 1, _MEMORY)
        self._mean += (tokens - self._mean) / self._texts

    def expected(self, limit: int) -> int:
        """Of a text that may have so many."""
        return max(1, min(limit, round(self._mean)))


class Planner:
    """Decides for one request after the other. For one thread at a time."""

    def __init__(self, offload: str = "auto", threshold: int = 0) -> None:
        """``offload`` as the setting says it; prompts with fewer than ``threshold`` tokens that
        vLLM has not cached stay there."""
        self._set = FIXED.get(offload)
        self._threshold = threshold
        self._strategies = Choices[Strategy]()
        self._codecs = Choices[str]()
        #: Of what vLLM does alone; a receiver's own are part of the question.
        self._local = Corrections()

    def decide(self, asked: Question, now: float) -> Decision:
        """``now`` is ``time.monotonic()``."""
        allowed = asked.allowed
        # "never" is the operator's word: no request goes before that.
        ordered = asked.ordered if self._set is not Strategy.VLLM else None
        new = asked.work.prompt - asked.work.cached
        if Strategy.VLLM in allowed and new < self._threshold and ordered is None:
            return Decision(Strategy.VLLM, "threshold")
        codec = self.codec(asked, now)
        if ordered is not None:
            if ordered in allowed:
                return Decision(ordered, "request", codec)
            return _unless(Strategy.SPLIT, allowed, "only", codec)
        if self._set is not None:
            return _as_set(self._set, allowed, codec)
        if len(allowed) == 1:
            return Decision(next(iter(allowed)), "only", codec)
        predictions = _predictions(asked, codec) if asked.pair is not None else []
        if not predictions:
            return _unless(Strategy.SPLIT, allowed, "unknown", codec)
        totals = {
            p.strategy: p.total * self._of(p.strategy, asked.corrections).factor(p.strategy, now)
            for p in predictions
        }
        best = _best(totals)
        chosen = self._strategies.settle(
            _kind(asked.work), best, totals, now, lambda kept: _in_vain(best, kept, totals)
        )
        reason: Reason = "fastest" if chosen is best else "kept"
        own = next(p.codec for p in predictions if p.strategy is chosen)
        return Decision(chosen, reason, own, tuple(predictions), tuple(totals.values()))

    def turned_out(self, plan: Plan, ratio: float, now: float) -> None:
        """The request took so many times as long as was predicted."""
        decision = plan.decision
        if decision.prediction is not None:
            corrections = self._of(decision.strategy, plan.corrections)
            corrections.observe(decision.strategy, ratio, now)

    def codec(self, asked: Question, now: float) -> Codec:
        """How KV travels if all of it does. What loses least is preferred to what gains little,
        and taken where nothing is known."""
        first = asked.codecs[0] if asked.codecs else RAW
        if len(asked.codecs) < 2 or asked.pair is None or Strategy.SPLIT not in asked.allowed:
            return first
        ways = {codec.name: codec for codec in asked.codecs}
        totals = {
            name: total
            for name, codec in ways.items()
            if math.isfinite(total := asked.predict(Strategy.SPLIT, codec).total)
        }
        if first.name not in totals:
            return first
        least = min(totals, key=totals.__getitem__)
        best = least if totals[first.name] > MARGIN * totals[least] else first.name
        name = self._codecs.settle(
            _kind(asked.work),
            best,
            totals,
            now,
            # What loses more is left as soon as it gains nothing.
            lambda kept: best == first.name and totals[best] <= EQUAL * totals[kept],
        )
        return ways[name]

    def _of(self, strategy: Strategy, receivers: Corrections) -> Corrections:
        return self._local if strategy is Strategy.VLLM else receivers


def _best(totals: dict[Strategy, float]) -> Strategy:
    """The fastest, or the preferred one of those that are as fast."""
    enough = EQUAL * min(totals.values())
    as_fast = [strategy for strategy, total in totals.items() if total <= enough]
    return min(as_fast, key=_PREFERRED.index)


def _in_vain(best: Strategy, kept: Strategy, totals: dict[Strategy, float]) -> bool:
    """Whether the receiver computes fronts that the stream would bring as soon. Both predictions
    have nearly everything in common, so that noise does not change which is less."""
    return (kept, best) == (Strategy.MEET, Strategy.SPLIT) and (
        totals[best] <= totals[kept] * EQUAL
    )


def _as_set(wanted: Strategy, allowed: Collection[Strategy], codec: Codec) -> Decision:
    """What the setting says; a hand-off where only that can be done of it, as for a router."""
    if wanted in allowed or wanted is Strategy.VLLM:
        return Decision(wanted, "setting", codec)
    return _unless(Strategy.SPLIT, allowed, "only", codec)


def _unless(
    strategy: Strategy, allowed: Collection[Strategy], reason: Reason, codec: Codec
) -> Decision:
    if strategy in allowed or not allowed:
        return Decision(strategy if allowed else Strategy.VLLM, reason, codec)
    local = Strategy.VLLM if Strategy.VLLM in allowed else next(iter(allowed))
    return Decision(local, "only", codec)


def _predictions(asked: Question, codec: Codec) -> list[Prediction]:
    """Of each strategy, in their order."""
    # What is computed beside it must fit: KV that is met travels raw.
    ways = {strategy: codec if strategy is Strategy.SPLIT else RAW for strategy in Strategy}
    found = [asked.predict(strategy, ways[strategy]) for strategy in Strategy
             if strategy in asked.allowed]  # fmt: skip
    return [prediction for prediction in found if math.isfinite(prediction.total)]


def _kind(work: Work) -> tuple[int, ...]:
    """Requests that cost alike: within a factor of two each way."""
    return (
        work.prompt.bit_length(),
        max(0, work.prompt - work.cached).bit_length(),
        max(0, work.prompt - work.held).bit_length(),
        work.output.bit_length(),
    )
