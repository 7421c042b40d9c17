"""What the receiver has promised for one session, and whether it keeps it.

Every message about a session passes here before anything comes of it: what is not exactly what the
protocol promises ends the hand-off, and nobody sees a token of it. ``trust.check`` has compared
token ids with the vocabulary by then.

A promise has a clock, too. Only what brings the response forward winds it up: tokens, and before
them the prompt's KV, which arrives or is computed there. A session that waits for room in the
receiver's batch does not stall, but waits ``queue_timeout`` at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from mlx_receiver.wire.layout import CacheLayout
from mlx_receiver.wire.messages import Complete, Compute, Decoded, Opened, Progress, Refused
from mlx_receiver.wire.sampling import Sampling
from mlx_receiver.wire.stopping import GOES_ON, Finish, check_stop

#: Of the prompt's KV, what must arrive within each ``stall_timeout``: a receiver that counts up
#: byte by byte must not keep a response waiting for ever.
_KV_SHARE: Final = 64

#: The same for the tokens of a prompt that the receiver computes, which takes it longer.
_TOKEN_SHARE: Final = 512


class BrokenPromise(Exception):
    """The receiver said what it must not say; the text tells what."""


class Promise:
    """One session, as the receiver has to serve it."""

    def __init__(
        self,
        sampling: Sampling,
        prompt_tokens: int,
        layout: CacheLayout,
        context: int,
        compute: Compute = "nothing",
    ) -> None:
        """``sampling``, the number of prompt tokens and what of them the receiver computes as
        ``Open`` has them, the layout of the prompt's cache, and the receiver's
        ``Welcome.max_tokens``."""
        self._sampling = sampling
        self._prompt_tokens = prompt_tokens
        self._layout = layout
        self._computes = compute == "front"
        self._whole = compute == "all"
        #: Bytes of KV that the receiver must get.
        self._need = 0 if self._whole else layout.nbytes(prompt_tokens)
        self._context = context
        self._opened = False
        #: The whole cache is there.
        self.complete = False
        self._started = False
        self._arrived = self._counted = 0  # bytes of KV: the latest, and what moved the clock
        #: Tokens of the prompt that the receiver has computed, as it said last.
        self.computed = 0
        self._credited = 0  # those that moved the clock
        self._reported = 0  # tokens
        self._moved = 0.0
        self._queued = False
        self._queued_since: float | None = None

    @property
    def missing(self) -> int:
        """Bytes of KV that are not known to have arrived."""
        return 0 if self.complete else self._need - self._arrived

    # --- what is said -------------------------------------------------------------------------

    def opened(self, message: Opened) -> None:
        """Raises BrokenPromise, as the next four do."""
        if self._opened:
            raise BrokenPromise("it opened the session twice")
        held = message.held
        if held.tokens > self._prompt_tokens:
            raise BrokenPromise(
                f"it holds {held.tokens} tokens of a prompt of {self._prompt_tokens}"
            )
        if self._whole and held.tokens:
            raise BrokenPromise("it holds part of a prompt that it is to compute")
        self._opened = True
        if self._whole:
            return
        self._need = self._layout.nbytes(self._prompt_tokens, held=held)

    def refused(self, message: Refused) -> None:
        """See ``opened``."""
        if self._opened:
            raise BrokenPromise("it refused the session that it had opened")

    def completed(self, message: Complete, now: float) -> None:
        """See ``opened``; ``now`` is ``time.monotonic()``, here and below."""
        if not self._opened or self.complete:
            raise BrokenPromise(
                f"it completed the cache {'twice' if self.complete else 'before it was open'}"
            )
        if message.computed_bytes and not self._computes:
            raise BrokenPromise("it computed what was to be sent")
        has = message.kv_bytes + message.computed_bytes
        if has != self._need:
            raise BrokenPromise(
                f"it completed a cache of {has} bytes; the prompt's has {self._need}"
            )
        if self._whole and not max(1, self.computed) <= message.computed <= self._prompt_tokens:
            raise BrokenPromise(
                f"it computed {message.computed} tokens after {self.computed}; "
                f"the prompt has {self._prompt_tokens}"
            )
        self.complete = True
        self.computed = message.computed
        self._arrived = self._counted = self._need
        self._moved = now

    def decoded(self, message: Decoded, tokens: Sequence[int], now: float) -> bool:
        """``tokens`` are the response so far, vLLM's own first one included.

        True if the text ends only because the receiver's context is full: vLLM can go on.
        """
        if not self.complete or not self._started:
            raise BrokenPromise("it decoded before it could")
        count = len(tokens)
        if message.position != count:
            raise BrokenPromise(f"its tokens begin at {message.position}; {count} are there")
        # Only the first token is not the receiver's own, so that it may find the text ended.
        finish = self._finish(tokens[0], 1) if count == 1 else GOES_ON
        if not message.token_ids and not finish.reason:
            raise BrokenPromise("it sent a step without a token")
        for token in message.token_ids:
            if finish.reason:
                raise BrokenPromise(f"it went on after token {count}, which ends the text")
            count += 1
            finish = self._finish(token, count)
        if (message.finish, message.stop_reason) != (finish.reason, finish.stop_reason):
            raise BrokenPromise(
                f"after token {count} it says {message.finish!r} ({message.stop_reason}), "
                f"where the text is at {finish.reason!r} ({finish.stop_reason})"
            )
        self._check_logprobs(message)
        self._moved, self._queued, self._queued_since = now, False, None
        return finish.reason == "length" and count < self._sampling.max_tokens

    def progress(self, message: Progress, now: float) -> None:
        """What ``Status`` says of the session."""
        if not self._arrived <= message.kv_bytes <= self._need:
            raise BrokenPromise(
                f"it holds {message.kv_bytes} bytes of KV after {self._arrived}; "
                f"the prompt's are {self._need}"
            )
        if not self._reported <= message.tokens <= self._sampling.max_tokens:
            raise BrokenPromise(
                f"it reports {message.tokens} tokens after {self._reported}, "
                f"{self._sampling.max_tokens} are the limit"
            )
        self._arrived, self._reported = message.kv_bytes, message.tokens
        self._count_computed(message.computed, now)
        share = max(1, self._need // _KV_SHARE)
        if self._arrived - self._counted >= share or self._counted < self._arrived == self._need:
            self._counted, self._moved = self._arrived, now
        queued = message.state == "queued" and (self.complete or self._whole)
        # It waits once, until a token comes: one that says so off and on gains no time by it.
        self._queued = queued and (self._queued or self._queued_since is None)
        if self._queued:
            self._queued_since = now if self._queued_since is None else self._queued_since
            self._moved = now

    def _count_computed(self, computed: int, now: float) -> None:
        """What ``Progress`` says of a prompt that the receiver computes."""
        if not self._whole or self.complete:
            return
        if not self.computed <= computed <= self._prompt_tokens:
            raise BrokenPromise(
                f"it reports {computed} computed tokens after {self.computed}; "
                f"the prompt has {self._prompt_tokens}"
            )
        self.computed = computed
        if computed - self._credited >= max(1, self._prompt_tokens // _TOKEN_SHARE):
            self._credited, self._moved = computed, now

    # --- the clock ----------------------------------------------------------------------------

    def start(self, now: float) -> None:
        """The response waits for the receiver from now on."""
        self._started, self._moved = True, now

    def overdue(self, now: float, stall_timeout: float, queue_timeout: float) -> str:
        """Why the response should wait no longer: "stalled", "queued", or "" while it should."""
        if self._queued and self._queued_since is not None:
            return "queued" if now - self._queued_since > queue_timeout else ""
        return "stalled" if self._started and now - self._moved > stall_timeout else ""

    # --- inside -------------------------------------------------------------------------------

    def _finish(self, token: int, count: int) -> Finish:
        sampling = self._sampling
        finish = check_stop(sampling, token, count, self._prompt_tokens + count, self._context)
        if finish.reason == "stop" and count <= sampling.min_tokens:
            raise BrokenPromise(
                f"token {count} ends the text, which has {sampling.min_tokens} at least"
            )
        return finish

    def _check_logprobs(self, message: Decoded) -> None:
        wanted, rows = self._sampling.logprobs, message.logprobs
        if wanted is None or not message.token_ids:
            if rows is not None:
                raise BrokenPromise("it sent log-probabilities that nobody asked for")
            return
        if rows is None or len(rows) != len(message.token_ids):
            raise BrokenPromise(
                f"it sent log-probabilities of {len(rows or ())} tokens, not of each"
            )
        for token, row in zip(message.token_ids, rows, strict=True):
            if row.token_ids[0] != token:
                raise BrokenPromise("its log-probabilities are another token's")
            if not len(row.token_ids) == len(row.values) == wanted + 1:
                raise BrokenPromise(
                    f"it sent {len(row.values)} log-probabilities of {len(row.token_ids)} tokens, "
                    f"not {wanted + 1}"
                )
