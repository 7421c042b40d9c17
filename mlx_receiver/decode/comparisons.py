"""The comparisons that wait until nothing is decoded; the decoding thread makes them."""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import TYPE_CHECKING

from mlx_receiver.decode.jobs import Proof, Verdict

if TYPE_CHECKING:
    from mlx_receiver.decode.model import LoadedModel, ModelSource

logger = logging.getLogger(__name__)


class Comparisons:
    """Thread-safe."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._waiting: deque[Proof] = deque()
        self._over = False

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, proof: Proof) -> None:
        """Let it wait, unless there will be no more."""
        with self._lock:
            if not self._over:
                self._waiting.append(proof)
                return
        _conclude(proof, None)

    def end(self) -> None:
        """None is made any more."""
        with self._lock:
            self._over = True
            waiting, self._waiting = self._waiting, deque()
        for proof in waiting:
            _conclude(proof, None)

    def drop_unwanted(self) -> None:
        """Let go of those that nobody wants any more: what they hold is others'."""
        with self._lock:
            over = [proof for proof in self._waiting if not proof.wanted()]
            for proof in over:
                self._waiting.remove(proof)
        for proof in over:
            _conclude(proof, None)

    def make_one(self, loaded: LoadedModel) -> None:
        """Compare what has waited for longest. On the decoding thread."""
        from mlx_receiver.decode.proof import compare, own_weights

        with self._lock:
            if not self._waiting:
                return
            proof = self._waiting.popleft()
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
