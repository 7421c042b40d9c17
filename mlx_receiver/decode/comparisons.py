"""The comparisons that wait until nothing is decoded, but not for ever; the decoding thread makes
them."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Final

from mlx_receiver.decode.jobs import Proof, Verdict

if TYPE_CHECKING:
    from mlx_receiver.decode.model import LoadedModel, ModelSource

logger = logging.getLogger(__name__)

#: Seconds that one waits for quiet. Nothing is handed off before it is made, and others may keep
#: the receiver busy all day; it takes as long as a few steps.
PATIENCE: Final = 10.0


class Comparisons:
    """Thread-safe."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self._lock = threading.Lock()
        #: Since when, and what.
        self._waiting: deque[tuple[float, Proof]] = deque()
        self._over = False

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, proof: Proof) -> None:
        """Let it wait, unless there will be no more."""
        with self._lock:
            if not self._over:
                self._waiting.append((time.monotonic(), proof))
                return
        _conclude(proof, None)

    def end(self) -> None:
        """None is made any more."""
        with self._lock:
            self._over = True
            waiting, self._waiting = self._waiting, deque()
        for _, proof in waiting:
            _conclude(proof, None)

    def drop_unwanted(self) -> None:
        """Let go of those that nobody wants any more: what they hold is others'."""
        with self._lock:
            over = [one for one in self._waiting if not one[1].wanted()]
            for one in over:
                self._waiting.remove(one)
        for _, proof in over:
            _conclude(proof, None)

    @property
    def overdue(self) -> bool:
        """Whether one has waited long enough."""
        with self._lock:
            return bool(self._waiting) and time.monotonic() > self._waiting[0][0] + PATIENCE

    def make_one(self, loaded: LoadedModel) -> None:
        """Compare what has waited for longest. On the decoding thread."""
        from mlx_receiver.decode.proof import compare, own_weights

        with self._lock:
            if not self._waiting:
                return
            _, proof = self._waiting.popleft()
        verdict = None
        try:
            weights = [own_weights(self._source.config, loaded.dtype), proof.weights]
            tokens, following = proof.prompt_token_ids, proof.following
            verdict = compare(
                loaded, tokens, proof.build_cache(), following, weights, proof.kv_dtype
            )
        except Exception:
            logger.exception("the two engines' caches could not be compared")
        _conclude(proof, verdict)


def _conclude(proof: Proof, verdict: Verdict | None) -> None:
    """Nothing of the proof is held any more."""
    proof.reservation.release()
    try:
        proof.done(verdict)
    except Exception:
        logger.exception("nobody could be told what comparing two caches gave")
