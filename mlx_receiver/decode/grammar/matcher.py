"""One text as it follows its grammar: which tokens may come next."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

#: Seconds that finding a step's tokens may take: every running response waits for it.
SLOW_SECONDS: Final = 0.5


class Matcher:
    """A text's position in its grammar. Of one thread.

    Where the grammar is complete the text may end, and where nothing can follow it must: with one
    of the ends, and with those only there, as vLLM has it (``override_stop_tokens`` of xgrammar).
    Behind an end that does not end the text, as with ``ignore_eos``, everything is allowed.
    """

    def __init__(
        self, matcher: Any, known: int, vocabulary: int, ends: Sequence[int], after: int | None
    ) -> None:
        """``matcher`` is an ``LLMatcher`` of this text's own, for a tokenizer of ``known`` tokens;
        for ``after`` see ``Grammar``."""
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._ends = list(ends)
        self._after = after
        self._over = False
        self._bits = np.zeros((known + 31) // 32, np.int32)
        #: Why the text cannot go on under its grammar; "" while it can.
        self.fault = ""

    def accept(self, token: int) -> None:
        """Note the text's next token; one that cannot come is a ``fault``."""
        if self._over or self.fault:
            return
        if self._after is not None:
            if token == self._after:
                self._after = None
            return
        began = time.perf_counter()
        if token in self._ends:
            self._over = self._matcher.is_accepting()
            taken = self._over
        else:
            taken = self._matcher.consume_token(token)
        if not taken:
            self._failed(f"token {token} cannot follow")
        self._timed(began)

    def allowed(self) -> NDArray[np.bool_] | None:
        """``[vocabulary]``, True for what may come next; None where anything may."""
        if self._over or self.fault or self._after is not None:
            return None
        began = time.perf_counter()
        bits = self._bits
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        if self._matcher.is_error():
            self._failed("no step of it can be computed")
            return None
        allowed = np.unpackbits(bits.view(np.uint8), bitorder="little")[: self._vocabulary]
        mask = allowed.view(np.bool_)
        complete = self._matcher.is_accepting()
        if self._matcher.is_stopped():
            mask[:] = False
        mask[self._ends] = complete
        self._timed(began)
        return mask

    def _failed(self, what: str) -> None:
        error = self._matcher.get_error().partition("\n<state>")[0]
        self.fault = f"the text does not conform to its grammar: {what} ({error or 'unexpected'})"

    def _timed(self, began: float) -> None:
        seconds = time.perf_counter() - began
        if seconds > SLOW_SECONDS and not self.fault:
            self.fault = f"a step of the grammar takes {seconds:.1f} s: simplify it"
