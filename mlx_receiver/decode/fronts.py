"""Prompts that MLX computes from the front while their KV comes from the end."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from mlx_receiver.decode.turns import GAP_SECONDS
from mlx_receiver.wire.messages import WireError

if TYPE_CHECKING:
    from mlx_receiver.decode.model import LoadedModel

logger = logging.getLogger(__name__)

#: Seconds that a chunk may take where nothing else is done between two steps. Nothing can be
#: decoded before the chunk has ended in which the two met.
CHUNK_SECONDS: Final = GAP_SECONDS

#: Tokens of a chunk: at least, before the first one is timed, and at most.
LEAST_CHUNK, FIRST_CHUNK, LONGEST_CHUNK = 16, 128, 2048

#: Seconds of a pause where the next tokens must wait for memory.
_PAUSE_SECONDS: Final = 0.001

#: Texts that may be decoded meanwhile. With more of them, all KV comes from vLLM: each chunk makes
#: every one of them wait.
MOST_ROWS: Final = 4


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next tokens of a prompt, none where they must wait, and the caches of what is before
    them."""

    tokens: list[int]
    caches: list[Any]


class Front(Protocol):
    """One prompt. Called on the decoding thread."""

    @property
    def wanted(self) -> bool:
        """Whether something of it may still have to be computed."""

    def next(self, most: int, rate: float, seconds: float) -> Chunk | None:
        """What is to be computed now, ``most`` tokens, at some ``rate`` of tokens a second (0: not
        known); None when there is nothing left. What must be copied before may take so many
        ``seconds``, then the tokens wait. Raises WireError where there is no memory."""

    def computed(self, tokens: int) -> None:
        """The caches hold so many tokens more."""

    def close(self) -> None:
        """Nothing is computed any more."""


@dataclass(slots=True, eq=False)
class _Turn:
    """One of those that wait: how many tokens of it take ``CHUNK_SECONDS``, and how many a second
    takes, 0 where that is not known. Both depend on what is before them."""

    front: Front
    chunk: int
    rate: float


class Fronts:
    """Those that wait for their turn, in the order in which they came: each has a chunk computed,
    then the next one has. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[_Turn] = deque()
        self._over = False
        #: What the last chunk has shown.
        self._chunk = FIRST_CHUNK
        self._rate = 0.0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, front: Front) -> None:
        """Let it wait, unless there will be no more."""
        with self._lock:
            if not self._over:
                self._waiting.append(_Turn(front, self._chunk, self._rate))
                return
        front.close()

    def end(self) -> None:
        """Nothing is computed any more."""
        with self._lock:
            self._over = True
            waiting, self._waiting = self._waiting, deque()
        for turn in waiting:
            turn.front.close()

    def drop_unwanted(self) -> None:
        """Let go of those that nobody wants any more."""
        with self._lock:
            over = [turn for turn in self._waiting if not turn.front.wanted]
        for turn in over:
            self._drop(turn)

    def wanting(self, rows: int) -> bool:
        """Whether something may be computed beside so many ``rows`` that are decoded."""
        return bool(self._waiting) and rows <= MOST_ROWS

    def compute(self, loaded: LoadedModel, rows: int, seconds: float = CHUNK_SECONDS) -> bool:
        """A chunk of the first one that need not wait for anything, of so many ``seconds``, beside
        ``rows`` that are decoded. Whether anything was done. On the decoding thread."""
        if not self.wanting(rows):
            return False
        began = time.perf_counter()
        for _ in range(len(self._waiting)):
            with self._lock:
                if not self._waiting:
                    return True
                turn = self._waiting[0]
                self._waiting.rotate(-1)
            if self._chunk_of(turn, loaded, seconds) or time.perf_counter() >= began + seconds:
                return True
        # Something may have been copied, which is not done in a moment.
        done = time.perf_counter() > began + _PAUSE_SECONDS
        if not rows:
            time.sleep(_PAUSE_SECONDS)
        return done

    def _chunk_of(self, turn: _Turn, loaded: LoadedModel, seconds: float) -> bool:
        """Whether something of it was computed. It is dropped where nothing is left, or that
        fails."""
        try:
            tokens = self._compute(turn, loaded, seconds)
        except WireError as error:
            logger.debug("a prompt's KV is not computed here: %s", error)
            tokens = None
        except Exception:
            logger.exception("a prompt's KV could not be computed; vLLM sends all of it")
            tokens = None
        if tokens is None:
            self._drop(turn)
        return bool(tokens)

    def _compute(self, turn: _Turn, loaded: LoadedModel, seconds: float) -> int | None:
        """Tokens that were computed; None when there is nothing left."""
        import mlx.core as mx
        from mlx_lm.generate import generation_stream

        most = max(LEAST_CHUNK, int(turn.chunk * min(1.0, seconds / CHUNK_SECONDS)))
        with mx.stream(generation_stream):
            chunk = turn.front.next(most, turn.rate, seconds)
            if chunk is None:
                return None
            if not chunk.tokens:
                return 0
            began = time.perf_counter()
            loaded.model(mx.array([chunk.tokens]), cache=chunk.caches)  # its logits never
            mx.eval([cache.state for cache in chunk.caches])
            tokens = len(chunk.tokens)
            del chunk
            turn.front.computed(tokens)
            took = time.perf_counter() - began
        # A short chunk says little about a long one, unless it took as long.
        if took > 0 and (tokens == most or took > seconds):
            turn.rate = tokens / took
            longest = max(2 * tokens, turn.chunk)
            wanted = min(int(turn.rate * CHUNK_SECONDS), longest, LONGEST_CHUNK)
            turn.chunk = max(wanted, LEAST_CHUNK)
            self._chunk, self._rate = turn.chunk, turn.rate
        return tokens

    def _drop(self, turn: _Turn) -> None:
        with self._lock:
            if turn in self._waiting:
                self._waiting.remove(turn)
        try:
            turn.front.close()
        except Exception:
            logger.exception("what was computed of a prompt could not be freed")
