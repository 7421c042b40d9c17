"""How fast this receiver computes its model: measured while nobody needs it, kept in a file, and
corrected by what is decoded.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Final

import msgspec

from mlx_receiver.caches.memory import Budget
from mlx_receiver.decode.device import engine_name, machine_name
from mlx_receiver.planning import cached
from mlx_receiver.planning.live import Estimate
from mlx_receiver.planning.review import Review
from mlx_receiver.wire import fingerprint

if TYPE_CHECKING:
    from mlx_receiver.decode.jobs import Job
    from mlx_receiver.decode.measuring import Measurement
    from mlx_receiver.decode.model import LoadedModel, ModelSource
    from mlx_receiver.wire.profile import Profile

logger = logging.getLogger(__name__)

#: Seconds without work after which measuring begins, or goes on.
_QUIET_SECONDS: Final = 1.0
#: Seconds between two measurements of a profile that requests contradict.
_AGAIN_SECONDS: Final = 600.0

#: Shows how much of a measurement is done, from 0 to 1.
Show = Callable[[float], None]


class Speed:
    """Written by the decoding thread, read by any."""

    def __init__(
        self,
        source: ModelSource,
        loaded: LoadedModel,
        budget: Budget,
        most_rows: int,
        measures: bool = True,
        fresh: bool = False,
    ) -> None:
        """What the file says, if there is one and it is not to be measured ``fresh``; otherwise it
        is measured, where it ``measures``. Batches have ``most_rows`` at the most."""
        self._source = source
        self._loaded: LoadedModel | None = loaded
        self._budget, self._rows = budget, most_rows
        #: Whether somebody lacked memory while it was measured.
        self.hampers = False
        self._measures = measures
        weights = fingerprint.of_folder(source.path)
        #: What the profile depends on.
        self.key = {
            "hardware": machine_name(),
            "mlx": engine_name(),
            "mlx-lm": metadata.version("mlx-lm"),
            "model": source.name,
            "weights": weights,
            "dtype": str(loaded.dtype),
        }
        # Unknown weights may be others at the next start.
        self._lasting = bool(weights)
        #: Where the profile comes from; None while there is none.
        self.saved = cached.read("receiver", self.key) if self._lasting and not fresh else None
        self._lock = threading.Lock()
        known = self.saved.profile if self.saved is not None else None
        self._known = self._here(known)  # as it was measured last
        self._estimate = Estimate(self._known)
        self._measurement: Measurement | None = None
        self._wanted = measures and known is None
        self._not_before = self._again = 0.0
        self._review = Review()
        self._watch = Watch(self._estimate, self._lock)
        self.finished = threading.Event()
        self.show: Show | None = None
        budget.short = self._short

    @property
    def profile(self) -> Profile | None:
        """As it is at present; None while it is not known."""
        with self._lock:
            return self._estimate.at(time.monotonic())

    def error(self, quantile: float, phase: str) -> float:
        """See ``live.Estimate.error``."""
        with self._lock:
            return self._estimate.error(quantile, phase)

    def _here(self, profile: Profile | None) -> Profile | None:
        if profile is None:
            return None
        return msgspec.structs.replace(profile, kv_bytes=self._budget.total)

    def _short(self) -> None:
        self.hampers = self._measurement is not None

    # --- the decoding thread -----------------------------------------------------------------

    @property
    def wanted(self) -> bool:
        """Whether there is something to measure, now or later."""
        return self._wanted

    @property
    def measuring(self) -> bool:
        """Whether a measurement is under way, and holds memory."""
        return self._measurement is not None and self._wanted

    @property
    def due(self) -> bool:
        """Whether it is to be measured now, if nobody needs the thread."""
        now = time.monotonic()
        if self._measures and not self._wanted and self._review.due(now):
            self._want()
        return self._wanted and now >= self._not_before

    @property
    def rests(self) -> float | None:
        """Seconds after which it may be due although nothing happens; None for never."""
        return max(0.0, self._review.left(time.monotonic())) if self._measures else None

    def _want(self) -> None:
        self._wanted = True
        self.finished.clear()
        self._review.begin()

    def busy(self) -> None:
        """Somebody needs the thread, or the memory."""
        self.hampers = False
        if self._wanted:
            self._not_before = time.monotonic() + _QUIET_SECONDS
            if self._measurement is not None:
                self._measurement.give_way()

    def forward(self) -> None:
        """Measure one forward."""
        try:
            if self._measurement is None:
                assert self._loaded is not None
                from mlx_receiver.decode.measuring import Measurement

                self._measurement = Measurement(
                    self._source, self._loaded, self._rows, self._budget
                )
            if self._measurement.advance():
                if self.show is not None:
                    self.show(self._measurement.share)
                return
            self._take(self._measurement)
        except Exception:
            # Nothing depends on it: vLLM's side plans without.
            logger.exception("how fast this machine is could not be measured")
        self.stop()

    def stop(self) -> None:
        """Nothing is measured any more."""
        measurement, self._measurement = self._measurement, None
        self._wanted = False
        if measurement is not None:
            measurement.give_way()
        self.finished.set()

    def close(self) -> None:
        """The model is about to be given up: nothing of it is held."""
        self.stop()
        self._measures = False
        self._loaded = self._budget.short = None

    def _take(self, measurement: Measurement) -> None:
        found = measurement.result()
        if found is None:
            logger.info("how fast this machine is could not be measured: there was no room for it")
            return
        self.saved = found.saved("receiver", self.key)
        profile = self._here(found.profile)
        assert profile is not None
        self._review.found(profile, self._known)
        self._known = profile
        with self._lock:
            self._estimate.measured(profile)
        logger.info("measured %s", self.saved.text)
        if self._lasting:
            cached.write(self.saved)

    def stepped(
        self,
        jobs: Sequence[Job],
        prefilled: tuple[int, float],
        decoded: Sequence[Job],
    ) -> None:
        """The batch of ``jobs`` has made a step: tokens of prompts that were prefilled, in how many
        seconds, and whose next tokens came."""
        if self._estimate.profile is None:
            return
        self._watch.stepped(jobs, prefilled, decoded, time.monotonic())
        if self._measures and not self._wanted:
            now = time.monotonic()
            with self._lock:
                distrusted = self._estimate.distrusted
            if distrusted and now >= self._again:
                logger.info("what is decoded takes other times than were measured: once more")
                self._want()
                self._not_before, self._again = now + _QUIET_SECONDS, now + _AGAIN_SECONDS

    def interrupted(self) -> None:
        """Something else was computed since the batch's last step."""
        self._watch.interrupted()


class Watch:
    """Tells an estimate what steps took, of those that say something: a prompt that is prefilled
    alone, and batches of the same texts one step after the other."""

    def __init__(self, estimate: Estimate, lock: threading.Lock) -> None:
        self._estimate, self._lock = estimate, lock
        self._prefilling: list[Job] = []  # in the step before
        self._alone: Job | None = None
        self._done = 0
        self._decoded: list[Job] = []  # in the step before
        self._at = 0.0

    def stepped(
        self,
        jobs: Sequence[Job],
        prefilled: tuple[int, float],
        decoded: Sequence[Job],
        now: float,
    ) -> None:
        """See ``Speed.stepped``."""
        tokens, seconds = prefilled
        prefilling = [job for job in jobs if job.prefills and not job.shown]
        if tokens:
            self._prefill(prefilling, tokens, seconds, bool(decoded), now)
        self._prefilling = prefilling
        same = bool(decoded) and len(decoded) == len(jobs) and list(decoded) == self._decoded
        if same and not tokens:
            context = sum(len(job.prompt_token_ids) + job.outputs for job in decoded)
            with self._lock:
                self._estimate.observe_decode(
                    context // len(decoded), len(decoded), now - self._at, now
                )
        # The step that follows a prefill waits for what was issued before it.
        self._decoded = list(decoded) if not tokens else []
        self._at = now

    def interrupted(self) -> None:
        """See ``Speed.interrupted``."""
        self._decoded = []  # the next step takes longer than one does

    def _prefill(
        self, prefilling: list[Job], tokens: int, seconds: float, beside: bool, now: float
    ) -> None:
        if len(prefilling) != 1:
            self._alone = None
            return
        (job,) = prefilling
        if job is not self._alone:
            # Only of one that was seen from its beginning on is it known how far it is.
            begins = job not in self._prefilling
            self._alone, self._done = (job, job.held) if begins else (None, 0)
        if self._alone is None:
            return
        if not beside:
            with self._lock:
                self._estimate.observe_prefill(tokens, self._done, seconds, now)
        self._done += tokens
