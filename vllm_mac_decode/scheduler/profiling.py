"""How fast vLLM computes the model: measured while it has nothing to do, and kept in a file.

Requests of nobody's, *trials* (``trials``), with random tokens that no cache holds. They are timed
from their scheduling to their outputs.
Whoever comes ends them at once; what was measured until then is kept, and the rest comes later.

No trial is given to an engine in whose cache less than a quarter of the blocks would be free of
requests, as with shadows.

Pure rules: no vLLM here. Every method wants the relay's lock to be held, and ``work`` the engine's
thread.
"""

from __future__ import annotations

import logging
import random
import secrets
import threading
from collections.abc import Iterable
from statistics import median
from typing import TYPE_CHECKING, Final

import msgspec

from mlx_receiver.planning import cached
from mlx_receiver.planning.fit import DecodeSample, PrefillSample, fit_decode, fit_prefill
from mlx_receiver.planning.live import Estimate, alike
from mlx_receiver.planning.measured import Measured
from mlx_receiver.planning.review import Review
from mlx_receiver.wire.profile import Coding, Profile
from mlx_receiver.wire.quantised import BITS
from vllm_mac_decode.scheduler.shadow import FREE_SHARE
from vllm_mac_decode.scheduler.trials import Asked, Item, Plan

if TYPE_CHECKING:
    from vllm.v1.metrics.stats import SchedulerStats

    from vllm_mac_decode.scheduler.port import EnginePort, Machine

logger = logging.getLogger("vllm.mac_decode.profiling")

#: Seconds of trials, altogether.
SECONDS: Final = 60.0
#: Seconds without a request after which trials begin, or go on; that one may wait in vLLM's queue;
#: and that one may take at all.
_QUIET_SECONDS: Final = 2.0
_QUEUE_SECONDS: Final = 1.0
_TRIAL_SECONDS: Final = 30.0
#: Trials that may come to nothing before it is given up, and the seconds until a profile that
#: requests contradict is measured once more.
_MOST_FAILED: Final = 40
_AGAIN_SECONDS: Final = 600.0
_LEAST_PREFILLS, _LEAST_DECODES = 4, 1


class Profiling:
    """The trials of one engine, and what they gave."""

    def __init__(self, enabled: bool) -> None:
        self._on = enabled
        #: vLLM's own profile, as requests correct it.
        self.estimate = Estimate(None)
        #: Where it comes from; None while there is none.
        self.saved: cached.Saved | None = None
        self._machine: Machine | None = None
        self._coding = Coding()
        self._plan: Plan | None = None
        self._asked: Asked | None = None
        self._prefills: list[PrefillSample] = []
        self._decodes: list[DecodeSample] = []
        self._spent, self._failed, self._number = 0.0, 0, 0
        self._busy_at = self._woken_at = self._again = 0.0
        self._review = Review()
        # Nobody outside this process can name a request so.
        self._prefix = f"mac-decode-trial-{secrets.token_hex(8)}-"
        self._rng = random.Random()
        self._text: list[int] = []
        self._lookups = [0, 0, 0]
        self._wanted = self._useful = False
        self._thread: threading.Thread | None = None
        self._found: cached.Saved | None = None

    @property
    def profile(self) -> Profile | None:
        """As it is at present; None while nothing was ever measured."""
        return self.estimate.profile

    def begin(self, machine: Machine, coding: Coding | None = None) -> None:
        """The engine is there, and its workers have measured how fast they quantise. What was
        measured before is read, whether or not more may be; where they have not measured it at this
        start, it is still as fast as then."""
        self._machine, self._coding = machine, coding or Coding()
        self.saved = cached.read("vllm", machine.key)
        if self.saved is None:
            self._want()
            return
        if not any(map(self._coding.rate, BITS)):
            self._coding = self.saved.profile.coding
        else:
            known = msgspec.structs.replace(self.saved.profile, coding=self._coding)
            if not alike(known, self.saved.profile):  # for the command line
                cached.write(msgspec.structs.replace(self.saved, profile=known))
            self.saved = msgspec.structs.replace(self.saved, profile=known)
        self.estimate.measured(self._here(self.saved.profile))

    def _here(self, profile: Profile) -> Profile:
        assert self._machine is not None
        return msgspec.structs.replace(profile, kv_bytes=self._machine.kv_bytes)

    def _want(self) -> None:
        if self._on and self._machine is not None:
            self._prefills, self._decodes = [], []
            self._spent, self._failed = 0.0, 0
            self._text = []
            self._plan = None
            self._wanted = True

    # --- the engine -------------------------------------------------------------------------

    def busy(self, engine: EnginePort | None, now: float) -> None:
        """Somebody's request came: the trial ends."""
        self._busy_at = now
        if self._asked is not None:
            self._withdraw(engine, now)

    def work(self, engine: EnginePort, now: float) -> None:
        """Give an idle engine the next trial, if there is one. For the engine's thread."""
        if not (self._wanted and self._useful) or self._asked is not None:
            return
        if now < self._busy_at + _QUIET_SECONDS or not engine.idle:
            return
        try:
            self._try(engine, now)
        except Exception:
            # Nothing depends on it: without a profile everything is handed off.
            logger.exception("how fast vLLM is will not be measured")
            self._on = self._wanted = False

    def look(self, engine: EnginePort | None, now: float, useful: bool) -> None:
        """Wake an idle engine for the next trial, take back what vLLM does not compute, and take
        up what was found. ``useful``: there is a receiver to share work with."""
        self._useful = useful
        if self._found is not None:
            self._take(self._found)
        if engine is None or self._machine is None:
            return
        asked = self._asked
        if asked is not None:
            limit = _TRIAL_SECONDS if asked.scheduled_at else _QUEUE_SECONDS
            if now - asked.since > limit:
                if self._plan is not None:
                    self._plan.skip()
                self._withdraw(engine, now)
            return
        fitting = self._thread is not None and self._thread.is_alive()
        if self._on and not (self._wanted or fitting):
            if self.estimate.distrusted and now >= self._again:
                logger.info("requests take other times than were measured: once more")
                self._again = now + _AGAIN_SECONDS
                self._want()
            elif self._review.due(now):
                self._want()
                self._review.begin()
        quiet = now >= self._busy_at + _QUIET_SECONDS and now >= self._woken_at + 1.0
        if self._wanted and useful and quiet and engine.idle:
            self._woken_at = now
            engine.wake()

    def _try(self, engine: EnginePort, now: float) -> None:
        assert self._machine is not None
        if engine.rules.everything:  # nothing is handed off, or generated at all
            self._on = self._wanted = False
            return
        if self._plan is None:
            self._plan = Plan(self._machine, engine.prefixes is not None)
        while (item := self._plan.next()) is not None:
            if engine.prefixes is None:
                break
            if engine.prefixes.room(item.tokens + item.output, item.rows) >= FREE_SHARE:
                break
            self._plan.skip()
        if item is None or self._spent > SECONDS or self._failed > _MOST_FAILED:
            self._conclude()
            return
        asked = Asked(item, [], now)
        for _ in range(item.rows):
            self._number += 1
            asked.ids.append(f"{self._prefix}{self._number}")
        self._asked = asked
        for request_id in asked.ids:
            engine.trial(request_id, self._prompt(item), item.output)

    def _prompt(self, item: Item) -> list[int]:
        assert self._machine is not None
        if not item.grown:
            return self._tokens(item.tokens)
        self._text += self._tokens(item.tokens - len(self._text))
        return self._text[: item.tokens]

    def _tokens(self, count: int) -> list[int]:
        """Random ones: no cache holds them, and not all of them go to the same experts. Those that
        stand for something else, images say, are at the ends of the vocabulary."""
        assert self._machine is not None
        quarter = self._machine.vocab_size // 4
        middle = range(quarter, self._machine.vocab_size - quarter)
        return self._rng.choices(middle, k=max(0, count))

    def _withdraw(self, engine: EnginePort | None, now: float) -> None:
        asked, self._asked = self._asked, None
        self._failed += 1
        if asked is None:
            return
        if asked.scheduled_at:
            self._spent += now - asked.scheduled_at
        if engine is not None:
            for request_id in asked.ids:
                if request_id not in asked.finished:
                    engine.withdraw(request_id)

    # --- its requests in vLLM's scheduler ----------------------------------------------------

    def owns(self, request_id: str) -> bool:
        """Whether it is a trial's: nobody waits for what it brings."""
        return request_id.startswith(self._prefix)

    @property
    def used(self) -> bool:
        """Whether vLLM ever saw a trial."""
        return self._number > 0

    def _has(self, request_id: str) -> Asked | None:
        asked = self._asked
        return asked if asked is not None and request_id in asked.ids else None

    def added(self, request_id: str) -> None:
        """vLLM's scheduler has taken it."""
        if (asked := self._has(request_id)) is not None:
            asked.added += 1

    def scheduled(self, request_id: str, cached: int, now: float) -> None:
        """vLLM computes it from now on, from its token ``cached`` on."""
        if (asked := self._has(request_id)) is None:
            return
        self._lookups = [
            self._lookups[0] + 1, self._lookups[1] + asked.item.tokens, self._lookups[2] + cached
        ]  # fmt: skip
        asked.cached = cached
        if not asked.scheduled_at:
            asked.scheduled_at = now

    def stepped(self, outputs: Iterable[tuple[str, int, bool]], now: float) -> None:
        """A step brought so many tokens of these requests, and ended them or not."""
        asked = self._asked
        counts = []
        for request_id, tokens, ended in outputs:
            if not self.owns(request_id):
                self._busy_at = now
            elif asked is not None and request_id in asked.ids:
                counts.append(tokens)
                if ended:
                    asked.finished.add(request_id)
        if asked is None:
            return
        if len(counts) == asked.item.rows and min(counts) > 0:
            asked.steps.append((now, sum(counts) / len(counts)))
        if len(asked.finished) == len(asked.ids):
            self._asked = None
            self._learn(asked)

    def gone(self, request_id: str, engine: EnginePort | None, now: float) -> None:
        """vLLM ended it, never began it, or took its blocks away for somebody else."""
        if (asked := self._has(request_id)) is not None:
            asked.finished.add(request_id)
            self._withdraw(engine, now)

    def reset(self, engine: EnginePort | None, now: float) -> list[str]:
        """vLLM's prefix cache is about to be emptied. The trials that vLLM's scheduler has, and is
        to end before that."""
        asked = self._asked
        if asked is None:
            return []
        self._withdraw(engine, now)
        self._text = []
        return [one for one in asked.ids if one not in asked.finished]

    def _learn(self, asked: Asked) -> None:
        item = asked.item
        if not asked.scheduled_at or not asked.steps or self._plan is None:
            self._failed += 1
            return
        first = asked.steps[0][0] - asked.scheduled_at
        self._spent += asked.steps[-1][0] - asked.scheduled_at
        if item.rows == 1 and item.output == 1 and first > 0:
            self._prefills.append(PrefillSample(item.tokens - asked.cached, asked.cached, first))
        pairs = list(zip(asked.steps[1:], asked.steps[2:], strict=False))
        seconds = [(b - a) / tokens for (a, _), (b, tokens) in pairs if b > a]
        if seconds:
            context = item.tokens + item.output // 2
            self._decodes.append(DecodeSample(context, item.rows, median(seconds)))
        self._plan.done(first)

    # --- what was found ---------------------------------------------------------------------

    def _conclude(self) -> None:
        """Everything is measured that can be."""
        self._wanted = False
        if len(self._prefills) < _LEAST_PREFILLS or len(self._decodes) < _LEAST_DECODES:
            logger.info("how fast vLLM is could not be measured: it had no time, or no room")
            return
        # Not on the engine's thread: the file may be slow.
        self._thread = threading.Thread(
            target=self._fit, name="mac-decode-profile", args=(self._machine,), daemon=True
        )
        self._thread.start()

    def _fit(self, machine: Machine) -> None:
        # The first one of all may have compiled something.
        prefill = fit_prefill(self._prefills[1:], machine.chunk)
        decode = fit_decode(self._decodes)
        if prefill is None or decode is None:
            return
        profile = Profile(
            machine.device, machine.model, prefill.found, decode.found, coding=self._coding
        )
        samples = len(self._prefills) + len(self._decodes)
        measured = Measured(profile, self._spent, samples, prefill.error, decode.error)
        found = measured.saved("vllm", machine.key)
        cached.write(found)
        self._found = found

    def _take(self, found: cached.Saved) -> None:
        before = self.saved.profile if self.saved is not None else None
        self._review.found(found.profile, before)
        self._found, self._thread, self.saved = None, None, found
        self.estimate.measured(self._here(found.profile))
        kept = "" if found.reliable else "; the machine had other work: the profile is not kept"
        logger.info("vLLM measured %s%s", found.text, kept)

    # --- statistics -------------------------------------------------------------------------

    def discount(self, engine: EnginePort, stats: SchedulerStats | None) -> None:
        """Take trials out of what a step says of the scheduler."""
        (requests, queries, hits), self._lookups = self._lookups, [0, 0, 0]
        if stats is None:
            return
        asked = self._asked
        if asked is not None:
            left = len(asked.ids) - len(asked.finished)
            if asked.scheduled_at:
                stats.num_running_reqs = max(0, stats.num_running_reqs - left)
            else:
                stats.num_waiting_reqs = max(0, stats.num_waiting_reqs - asked.added)
        if requests and engine.prefixes is not None:
            engine.prefixes.discount(stats, requests, queries, hits)
