"""Copies of prompts that are being decoded, for others that begin alike: made between two steps.

A prompt's rows do not change while its text is decoded, but they lie in arrays that every step
writes into. Whoever held them would make MLX copy them whole at the next step, so each layer's are
copied at once, and not too many before the next step.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlx_receiver.decode.jobs import Job

if TYPE_CHECKING:
    from mlx_receiver.decode.batch import Batch

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Copy:
    """The first ``tokens`` of a job's prompt; for ``wanted`` and ``done`` see ``CopyPrompt``."""

    job: Job
    tokens: int
    wanted: Callable[[], bool]
    done: Callable[[list[Any] | None], None]
    layers: list[Any] = field(default_factory=list)


class Copies:
    """Those that are to be made. ``add`` and ``end`` may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[Copy] = []
        self._over = False

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, copy: Copy) -> None:
        """Let it wait, unless there will be no more."""
        with self._lock:
            if not self._over:
                self._waiting.append(copy)
                return
        _conclude(copy, None)

    def make(self, batch: Batch, seconds: float) -> None:
        """Copy for some time, what has waited for longest first; a layer that has been begun is
        finished. On the decoding thread."""
        until = time.perf_counter() + seconds
        for copy in list(self._waiting):
            if _go_on(copy, batch, until):
                with self._lock:
                    if copy not in self._waiting:
                        continue  # it has ended
                    self._waiting.remove(copy)
                _conclude(copy, copy.layers if len(copy.layers) == batch.layers else None)
            if time.perf_counter() > until:
                return

    def end(self) -> None:
        """None is made any more."""
        with self._lock:
            self._over = True
            waiting, self._waiting = self._waiting, []
        for copy in waiting:
            _conclude(copy, None)


def copy_now(copy: Copy, batch: Batch) -> None:
    """All of it, however long that takes, or nothing. On the decoding thread."""
    whole = _go_on(copy, batch, math.inf) and len(copy.layers) == batch.layers
    _conclude(copy, copy.layers if whole else None)


def _go_on(copy: Copy, batch: Batch, until: float) -> bool:
    """Copy more of its layers; whether it is over, made or not."""
    try:
        while len(copy.layers) < batch.layers:
            # A job that is not in the batch any more keeps nothing.
            if copy.job.keep is None or not copy.wanted():
                return True
            if not batch.decodes(copy.job):
                return False  # it joins with the next step
            copy.layers.append(batch.beginning(copy.job, len(copy.layers), copy.tokens))
            if time.perf_counter() > until:
                break
    except Exception:
        logger.exception("a prompt could not be copied")
        return True
    return len(copy.layers) == batch.layers


def _conclude(copy: Copy, layers: list[Any] | None) -> None:
    try:
        copy.done(layers)
    except Exception:
        logger.exception("a copied prompt could not be kept")
