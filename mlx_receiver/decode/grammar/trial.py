"""Trying a grammar out where it can do no harm: in a process that ends when it takes too long.

llguidance bounds what a step of a text may cost, but a small schema can keep it compiling for
minutes (``{"type": "integer", "multipleOf": 99999999}``), and a thread inside it cannot be stopped.
What has passed here compiles here as fast.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import subprocess
import sys
import threading
import time
from typing import Any, Final

import msgspec

from mlx_receiver.wire.messages import E_INTERNAL, E_SHUTDOWN, E_UNSUPPORTED, WireError, clipped
from mlx_receiver.wire.sampling import Grammar

#: Seconds of computing that a grammar may take to be translated, compiled and begun.
SECONDS: Final = 3.0

#: Seconds of computing that its first step may take: such a step holds up every running response.
STEP_SECONDS: Final = 0.05

#: Bytes that the process may take for it, beside what it has once the tokenizer is loaded. macOS
#: does not enforce it: there the time bounds it.
MEMORY: Final = 1 << 30

#: Characters of an error that are told.
_SHOWN: Final = 300


def parser_limits() -> Any:
    """What one step of a text may cost: some 20 ms at most, by what was tried."""
    import llguidance

    return llguidance.LLParserLimits(
        initial_lexer_fuel=500_000,
        step_lexer_fuel=100_000,
        step_max_items=20_000,
        max_lexer_states=100_000,
        max_grammar_size=100_000,
    )


class TooMuchError(WireError):
    """The grammar takes more time or memory than it may."""


class Trial:
    """The process, which begins with the first grammar. Of one thread, but for ``close``."""

    def __init__(
        self, tokenizer: str, vocabulary: int, eos: list[int], seconds: float = SECONDS
    ) -> None:
        """The tokenizer as ``tokenizers`` writes it, the vocabulary's size, and what ends a text.
        A grammar may take so many ``seconds``."""
        settings = {"tokenizer": tokenizer, "vocabulary": vocabulary, "eos": eos}
        self._settings = json.dumps(settings | {"seconds": seconds})
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._closed = False

    def translate(self, grammar: Grammar) -> str:
        """The grammar as ``LLMatcher`` takes it. Raises WireError (``unsupported``) naming what is
        wrong with it, TooMuchError where it has ended the process."""
        answer = self._ask(msgspec.json.encode(grammar).decode())
        if answer is None:
            raise TooMuchError(
                E_UNSUPPORTED,
                f"the grammar takes more than {self._seconds:g} s or {MEMORY >> 20} MiB to "
                "compile: simplify it",
            )
        if answer["error"]:
            raise WireError(E_UNSUPPORTED, f"the grammar is refused: {answer['error']}")
        return str(answer["grammar"])

    def close(self) -> None:
        """End the process, in whatever it is."""
        with self._lock:
            self._closed = True
            process = self._process
        if process is not None:
            _end(process)

    def _ask(self, line: str) -> dict[str, str] | None:
        """The process's answer; None where it has died of the question."""
        for _ in range(2):
            process = self._running()
            assert process.stdin is not None and process.stdout is not None
            with contextlib.suppress(OSError, ValueError):
                process.stdin.write(line + "\n")
                process.stdin.flush()
                # It ends by itself when its time is up.
                if said := process.stdout.readline():
                    found: dict[str, str] = json.loads(said)
                    return found
            self._process = None
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1.0)  # a moment after its pipes
            killed = process.poll() == -signal.SIGKILL
            _end(process)
            if not killed:
                break  # else somebody else has killed it: it is not the grammar's fault
        return None

    def _running(self) -> subprocess.Popen[str]:
        with self._lock:
            if self._closed:
                raise WireError(E_SHUTDOWN, "the receiver is stopping")
            if self._process is not None:
                if self._process.poll() is None:
                    return self._process
                _end(self._process)  # it was killed, or the machine slept
            process = self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                # What a terminal sends to the receiver is not for it.
                start_new_session=True,
            )
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(self._settings + "\n")
            process.stdin.flush()
            ready = process.stdout.readline()
        except OSError:
            ready = ""
        if not ready:
            self._process = None
            _end(process)
            raise WireError(E_INTERNAL, "the process that tries grammars out does not start")
        return process


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


# --- in that process ----------------------------------------------------------------------------


def main() -> None:
    """Answer each grammar on standard input with a line on standard output."""
    import llguidance

    settings = json.loads(sys.stdin.readline())
    tokenizer = llguidance.LLTokenizer(
        settings["tokenizer"], n_vocab=settings["vocabulary"], eos_token=settings["eos"] or None
    )
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    taken = usage << 10 if sys.platform == "linux" else usage
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_DATA, (taken + MEMORY, resource.RLIM_INFINITY))
    seconds = settings["seconds"]
    print("ready", flush=True)
    for line in sys.stdin:
        # Both signals end the process, also while it is in llguidance.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, 10 * seconds)
        answer = _answer(msgspec.json.decode(line, type=Grammar), tokenizer)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(answer), flush=True)


def _answer(grammar: Grammar, tokenizer: Any) -> dict[str, str]:
    import llguidance

    from mlx_receiver.decode.grammar.translation import translated

    try:
        text = translated(grammar)
        matcher = llguidance.LLMatcher(tokenizer, text, log_level=0, limits=parser_limits())
        error = matcher.get_error()
        if not error:
            began = time.thread_time()
            matcher.compute_bitmask()
            took = time.thread_time() - began
            error = matcher.get_error()
            if not error and took > STEP_SECONDS:
                error = f"its first step takes {1e3 * took:.0f} ms: simplify it"
    except Exception as raised:
        # Libraries raise whatever they like about what strangers write.
        text, error = "", f"{type(raised).__name__}: {raised}"
    # What follows is the parser's state.
    error = error.partition("\n<state>")[0]
    return {"grammar": "" if error else text, "error": clipped(" ".join(error.split()), _SHOWN)}


if __name__ == "__main__":
    main()
