"""How fast the model is computed here: forwards of nobody's, timed one by one.

A text of random tokens grows by chunks, as a prompt does that MLX prefills; then some blocks are
decoded as if they had come quantised, and batches of several sizes behind caches of zeros, as
sessions are. Between any two forwards whoever needs
the decoding thread can have it: what was measured until then is kept, and the rest comes later.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator
from statistics import median
from typing import Final

import mlx.core as mx
from mlx_lm.generate import generation_stream

from mlx_receiver.caches.memory import Budget, Reservation
from mlx_receiver.decode.batch import PREFILL_SECONDS, Batch
from mlx_receiver.decode.coding import Decoding
from mlx_receiver.decode.device import machine_name
from mlx_receiver.decode.jobs import Job, Output
from mlx_receiver.decode.model import LoadedModel, ModelSource
from mlx_receiver.planning.fit import DecodeSample, PrefillSample, fit_decode, fit_prefill
from mlx_receiver.planning.measured import Measured
from mlx_receiver.wire.messages import Code
from mlx_receiver.wire.profile import Prefill, Profile
from mlx_receiver.wire.sampling import Sampling

logger = logging.getLogger(__name__)

#: Seconds of forwards, altogether and of prefills.
SECONDS: Final = 20.0
_PREFILL_SHARE: Final = 0.5
#: Lengths of the first and the longest chunk, and how far the text grows.
_SHORTEST, _LONGEST, _GROWN = 16, 2048, 4096
#: Times that a chunk of each length is computed; the first one may compile something.
_EACH: Final = 3
#: Seconds that the shortest chunk may take.
_TOO_LONG: Final = 0.5
#: Tokens and texts of each batch, the cheapest first.
_BATCHES: Final = (
    (64, 1), (1024, 1), (64, 2), (64, 4), (1024, 4), (4096, 1), (64, 8), (512, 8), (2048, 4),
)  # fmt: skip
#: Decode steps of each batch that are not counted, and that are.
_UNCOUNTED, _COUNTED = 2, 5
#: Prefills and batches below which nothing is known.
_LEAST_PREFILLS, _LEAST_BATCHES = 4, 2


class Measurement:
    """For the decoding thread, while nothing else is decoded."""

    def __init__(
        self,
        source: ModelSource,
        loaded: LoadedModel,
        most_rows: int,
        budget: Budget,
        seconds: float = SECONDS,
    ) -> None:
        """Batches have ``most_rows`` at the most, and everything takes no more memory than a
        quarter of what is free in the ``budget``; nothing that is kept makes room for it."""
        self._source = source
        self._loaded = loaded
        self._rows = most_rows
        self._budget = budget
        self._borrowed: list[Reservation] = []
        self._seconds = seconds
        self._spent = 0.0
        self._rng = random.Random(1)
        self._prefills: list[PrefillSample] = []
        self._decodes: list[DecodeSample] = []
        self._batches = list(_BATCHES)
        self._prefilled = False
        self._decoding = Decoding(loaded.cache.layout)
        self._forwards: Iterator[None] | None = None

    @property
    def share(self) -> float:
        """How much of it is done."""
        done = len(_BATCHES) - len(self._batches) + (self._prefilled * len(_BATCHES))
        return max(done / (2 * len(_BATCHES)), min(1.0, self._spent / self._seconds))

    @property
    def seconds(self) -> float:
        """That it has taken so far."""
        return self._spent

    def advance(self) -> bool:
        """Compute one forward; False when there is nothing left to do. Raises what MLX raises."""
        if self._forwards is None:
            self._forwards = self._all()
        began = time.perf_counter()
        try:
            return next(self._forwards, self) is None
        finally:
            self._spent += time.perf_counter() - began

    def give_way(self) -> None:
        """Hold nothing, until it is to go on."""
        forwards, self._forwards = self._forwards, None
        if forwards is not None:
            forwards.close()  # type: ignore[attr-defined]
        self._give_back()

    def result(self) -> Measured | None:
        """What was found; None if it was too little."""
        prefill = fit_prefill(self._prefills, _LONGEST)
        decode = fit_decode(self._decodes)
        if len(self._prefills) < _LEAST_PREFILLS or len(self._decodes) < _LEAST_BATCHES:
            return None
        if prefill is None or decode is None:
            return None
        bandwidth = 0
        # Of experts a step reads some.
        if decode.found.step > 0 and not self._loaded.experts:
            bandwidth = min(int(self._loaded.nbytes / decode.found.step), 2**63 - 1)
        found = prefill.found
        profile = Profile(
            machine_name(),
            self._source.name,
            Prefill(found.step, found.token, found.pair, _chunk(found)),
            decode.found,
            bandwidth=bandwidth,
            coding=self._decoding.found,
        )
        samples = len(self._prefills) + len(self._decodes)
        return Measured(profile, self._spent, samples, prefill.error, decode.error)

    def _all(self) -> Iterator[None]:
        if not self._prefilled:
            yield from self._grow()
            self._give_back()
            self._prefilled = True
        while not self._decoding.done and self._borrows(self._decoding.nbytes):
            try:
                self._decoding.step()
            except Exception:
                # Of a profile it is the least: plans take what a usual core does.
                logger.exception("how fast blocks are decoded could not be measured")
                break
            yield
        self._give_back()
        while self._batches:
            if self._spent > self._seconds:
                self._batches.clear()
                return
            yield from self._decode(*self._batches[0])
            self._give_back()
            del self._batches[0]

    def _grow(self) -> Iterator[None]:
        """Prefill a text, in chunks that become as long as the batch would have them."""
        most = min(_GROWN, self._source.max_tokens - 1)
        caches = self._loaded.cache.empty()
        context, length, left = 0, _SHORTEST, _EACH
        until = self._seconds * _PREFILL_SHARE
        while context + length <= most and self._spent < until and self._fits(context + length, 1):
            began = time.perf_counter()
            with mx.stream(generation_stream):
                # As the batch does: the logits are never computed.
                self._loaded.model(mx.array([self._tokens(length)]), cache=caches)
                mx.eval([cache.state for cache in caches])
            seconds = time.perf_counter() - began
            if left < _EACH:
                self._prefills.append(PrefillSample(length, context, seconds))
            context += length
            left -= 1
            if left <= 0 and length < _LONGEST and 4 * seconds < PREFILL_SECONDS:
                length, left = min(4 * length, _LONGEST), _EACH
            elif seconds > 2 * PREFILL_SECONDS:
                # Whoever comes has to wait for it, and the text only gets longer.
                if length == _SHORTEST and seconds > _TOO_LONG:
                    return
                length = max(length // 2, _SHORTEST)
            yield

    def _decode(self, context: int, rows: int) -> Iterator[None]:
        """Decode a batch for some steps."""
        steps = _UNCOUNTED + _COUNTED
        context = min(context, self._source.max_tokens - steps - 2)
        # A batch is made by copying.
        if rows > self._rows or context < 1 or not self._fits(context + steps, 2 * rows):
            return
        batch = Batch(self._source, self._loaded, rows)
        jobs: list[Job] = []
        try:
            for _ in range(rows):
                jobs.append(self._job(context, steps))
                batch.add(batch.prepare(jobs[-1]))
                yield
            counted: list[float] = []
            shown = 0
            while len(counted) < _COUNTED and self._spent < 2 * self._seconds:
                began = time.perf_counter()
                tokens = batch.step()
                seconds = time.perf_counter() - began
                shown += len(tokens) == rows
                if shown > _UNCOUNTED:
                    counted.append(seconds)
                for job, _ in tokens:
                    job.shown = True
                yield
            middle = context + _UNCOUNTED + _COUNTED // 2
            if counted:
                self._decodes.append(DecodeSample(middle, rows, median(counted)))
        finally:
            batch.close()

    def _job(self, context: int, steps: int) -> Job:
        prompt = self._tokens(context)
        sampling = Sampling(max_tokens=steps + 2, temperature=0.0)
        if self._loaded.local:
            # No memory can be made for what is not known: MLX prefills it.
            return Job(prompt, sampling, _NOBODY)
        cache = self._loaded.cache
        buffers = cache.allocate(cache.layout, context, steps + 2)
        while buffers.grow():
            pass
        return Job(prompt, sampling, _NOBODY, self._tokens(1)[0], buffers.build)

    def _tokens(self, count: int) -> list[int]:
        """Random ones: equal ones would all go to the same experts."""
        return self._rng.choices(range(self._source.signature.vocab_size), k=count)

    def _fits(self, tokens: int, rows: int) -> bool:
        """Have memory for so many rows of so many tokens; False where there is too little."""
        return self._borrows(rows * self._budget.kv_bytes(tokens))

    def _borrows(self, need: int) -> bool:
        there = sum(borrowed.nbytes for borrowed in self._borrowed)
        if need <= there:
            return True
        if need > (self._budget.free + there) / 4:
            return False
        more = self._budget.borrow(need - there)
        if more is not None:
            self._borrowed.append(more)
        return more is not None

    def _give_back(self) -> None:
        """The caches are gone."""
        borrowed, self._borrowed = self._borrowed, []
        for reservation in borrowed:
            reservation.release()


def _chunk(prefill: Prefill) -> int:
    """Tokens of the longest chunk that the batch would compute at once."""
    low, high = _SHORTEST, _LONGEST
    while low < high:
        middle = (low + high + 1) // 2
        seconds = prefill.step + middle * prefill.token + middle * middle / 2 * prefill.pair
        low, high = (middle, high) if seconds <= PREFILL_SECONDS else (low, middle - 1)
    return low


class _Nobody:
    """A sink."""

    def decoded(self, outputs: list[Output]) -> None:
        """See ``jobs.Sink.decoded``."""

    def failed(self, job: Job, code: Code, reason: str) -> None:
        """See ``jobs.Sink.failed``."""


_NOBODY: Final = _Nobody()
