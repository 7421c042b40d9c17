"""The grammars of the requests under way: each compiled once, off the decoding thread.

Two threads compile. The first has little time for each; what takes longer goes to the second, so
that grammars that take seconds wait for each other, and the others for none of them.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from typing import Any, Final

import msgspec

from mlx_receiver.decode.grammar.matcher import Matcher
from mlx_receiver.decode.grammar.trial import TooMuchError, Trial, parser_limits
from mlx_receiver.decode.model import ModelSource
from mlx_receiver.wire.messages import (
    E_CAPACITY,
    E_INTERNAL,
    E_SHUTDOWN,
    E_UNSUPPORTED,
    Code,
    WireError,
)
from mlx_receiver.wire.sampling import Grammar

logger = logging.getLogger(__name__)

#: Compiled grammars that are kept, those that were refused included.
MAX_GRAMMARS: Final = 64

#: Grammars that may wait to be compiled, and those of them that take long.
MAX_WAITING: Final = 32
MAX_SLOW: Final = 8

#: Seconds of computing after which a grammar takes long: most are compiled in a few milliseconds.
QUICK_SECONDS: Final = 0.25


class Compiled:
    """A grammar, ready for texts."""

    def __init__(self, matcher: Any, known: int, vocabulary: int) -> None:
        """``known`` tokens are the tokenizer's, ``vocabulary`` the model's."""
        self._matcher = matcher
        self._known = known
        self._vocabulary = vocabulary

    def begin(self, ends: Sequence[int], after: int | None) -> Matcher:
        """A text at its beginning; see ``Matcher``."""
        return Matcher(self._matcher.deep_copy(), self._known, self._vocabulary, ends, after)


class Grammars:
    """Compiles the grammars of one model. Methods may be called from any thread."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._kept: OrderedDict[Grammar, Future[Compiled]] = OrderedDict()
        #: Why others were refused: they must not push out those that are in use.
        self._refused: OrderedDict[Grammar, str] = OrderedDict()
        #: Those that are not compiled yet.
        self._pending: set[Future[Compiled]] = set()
        self._slow = 0
        # One slow one at a time: they must not take every core from decoding.
        self._quick_thread: ThreadPoolExecutor | None = None
        self._slow_thread: ThreadPoolExecutor | None = None
        self._tokenizer: Any = None
        #: What a ``Trial`` is told of the tokenizer.
        self._told: tuple[str, int, list[int]] | None = None
        self._trial: Trial | None = None
        self._slow_trial: Trial | None = None
        self._closed = False

    def compile(self, grammar: Grammar) -> Future[Compiled]:
        """The grammar, compiled at some time. The future raises WireError: ``unsupported`` for one
        that cannot be used, ``capacity`` when too many wait."""
        key = msgspec.structs.replace(grammar, after=None)
        with self._lock:
            if (future := self._kept.get(key)) is not None:
                self._kept.move_to_end(key)
                return future
            if (reason := self._refused.get(key)) is not None:
                self._refused.move_to_end(key)
                return _refused(E_UNSUPPORTED, reason)
            if self._closed:
                return _refused(E_SHUTDOWN, "the receiver is stopping")
            if len(self._pending) >= MAX_WAITING:
                return _refused(E_CAPACITY, f"{MAX_WAITING} grammars wait to be compiled")
            if self._quick_thread is None:
                self._quick_thread = ThreadPoolExecutor(1, thread_name_prefix="mlx-grammar")
            future = Future()
            self._pending.add(future)
            self._quick_thread.submit(self._compile_quickly, key, future)
            self._kept[key] = future
            while len(self._kept) > MAX_GRAMMARS:
                self._kept.popitem(last=False)
            return future

    def close(self) -> None:
        """Compile nothing any more."""
        with self._lock:
            self._closed = True
            threads = [self._quick_thread, self._slow_thread]
            trials = [self._trial, self._slow_trial]
            pending = list(self._pending)
        for trial in trials:
            if trial is not None:
                trial.close()
        for thread in threads:
            if thread is not None:
                thread.shutdown(wait=False, cancel_futures=True)
        for future in pending:
            self._fail(future, WireError(E_SHUTDOWN, "the receiver is stopping"))

    # --- its threads ----------------------------------------------------------------------------

    def _compile_quickly(self, grammar: Grammar, future: Future[Compiled]) -> None:
        try:
            self._compile(grammar, future, self._ready)
        except TooMuchError:
            self._put_off(grammar, future)

    def _put_off(self, grammar: Grammar, future: Future[Compiled]) -> None:
        """Leave it to the other thread, unless too many wait for that."""
        with self._lock:
            if self._closed:
                return
            taken = self._slow < MAX_SLOW
            if taken:
                if self._slow_thread is None:
                    self._slow_thread = ThreadPoolExecutor(1, thread_name_prefix="mlx-grammar-slow")
                self._slow += 1
                self._slow_thread.submit(self._compile_slowly, grammar, future)
        if not taken:
            self._forget(grammar)
            reason = f"{MAX_SLOW} grammars that take long wait to be compiled"
            self._fail(future, WireError(E_CAPACITY, reason))

    def _compile_slowly(self, grammar: Grammar, future: Future[Compiled]) -> None:
        try:
            self._compile(grammar, future, self._ready_for_slow)
        except TooMuchError as error:
            self._refuse(grammar, error)
            self._fail(future, WireError(error.code, error.reason))
        finally:
            with self._lock:
                self._slow -= 1

    def _compile(
        self, grammar: Grammar, future: Future[Compiled], ready: Callable[[], Trial]
    ) -> None:
        """Compile it, or let the future say why not. Raises TooMuchError."""
        began = time.perf_counter()
        try:
            compiled = self._compiled(grammar, ready())
        except TooMuchError:
            raise
        except WireError as error:
            self._refuse(grammar, error)
            # Another one: an exception keeps alive what raised it.
            self._fail(future, WireError(error.code, error.reason))
            return
        except Exception as error:
            if not self._closed:  # which ends the processes that try them out
                logger.exception("compiling a grammar failed")
            self._forget(grammar)
            self._fail(future, WireError(E_INTERNAL, f"compiling the grammar failed: {error}"))
            return
        logger.debug("a grammar was compiled in %.3f s", time.perf_counter() - began)
        with self._lock:
            self._pending.discard(future)
        with contextlib.suppress(InvalidStateError):  # it was closed meanwhile
            future.set_result(compiled)

    def _fail(self, future: Future[Compiled], error: WireError) -> None:
        with self._lock:
            self._pending.discard(future)
            if self._closed:  # whatever failed then did so because of that
                error = WireError(E_SHUTDOWN, "the receiver is stopping")
        with contextlib.suppress(InvalidStateError):
            future.set_exception(error)

    def _refuse(self, grammar: Grammar, error: WireError) -> None:
        """Say why, and remember it where it is the grammar's fault."""
        logger.info("a grammar (%s) cannot be used: %s", grammar.kind, error.reason)
        self._forget(grammar)
        if error.code != E_UNSUPPORTED:
            return
        with self._lock:
            self._refused[grammar] = error.reason
            while len(self._refused) > MAX_GRAMMARS:
                self._refused.popitem(last=False)

    def _forget(self, grammar: Grammar) -> None:
        with self._lock:
            self._kept.pop(grammar, None)

    def _compiled(self, grammar: Grammar, trial: Trial) -> Compiled:
        import llguidance

        text = trial.translate(grammar)
        matcher = llguidance.LLMatcher(self._tokenizer, text, log_level=0, limits=parser_limits())
        if error := matcher.get_error():
            raise WireError(E_UNSUPPORTED, f"the grammar is refused: {error}")
        matcher.compute_bitmask()  # each text begins with a copy, in which its first step is there
        return Compiled(matcher, self._tokenizer.vocab_size, self._source.signature.vocab_size)

    def _ready(self) -> Trial:
        """The process that tries grammars out; the tokenizer is loaded first."""
        if self._trial is None:
            try:
                import llguidance
                from mlx_lm.tokenizer_utils import load

                tokenizer = load(self._source.path)
                # The file alone may lack tokens that its neighbours add.
                text = tokenizer.backend_tokenizer
                text.no_padding()
                text.no_truncation()
                eos = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
                # Models have more rows than tokens, or fewer than tokens were added.
                vocabulary = max(
                    self._source.signature.vocab_size, text.get_vocab_size(with_added_tokens=True)
                )
                self._tokenizer = llguidance.LLTokenizer(
                    text.to_str(), n_vocab=vocabulary, eos_token=eos or None
                )
            except Exception as error:
                # No memory, or no file, may be there again.
                passing = isinstance(error, OSError | MemoryError)
                raise WireError(
                    E_INTERNAL if passing else E_UNSUPPORTED,
                    f"grammars need the model's fast tokenizer: {error}",
                ) from error
            with self._lock:
                self._told = text.to_str(), vocabulary, eos
                self._trial = Trial(*self._told, QUICK_SECONDS)
                if self._closed:
                    self._trial.close()
        return self._trial

    def _ready_for_slow(self) -> Trial:
        """The process for those that take long."""
        with self._lock:
            if self._slow_trial is None:
                assert self._told is not None  # what has been put off was tried
                self._slow_trial = Trial(*self._told)
                if self._closed:
                    self._slow_trial.close()
            return self._slow_trial


def _refused(code: Code, reason: str) -> Future[Compiled]:
    future: Future[Compiled] = Future()
    future.set_exception(WireError(code, reason))
    return future
