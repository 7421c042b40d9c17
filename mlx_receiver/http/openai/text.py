"""From tokens to text, one token at a time, as vLLM's detokenizer does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from mlx_receiver.http.openai.tokenizer import Tokenizer

#: Tokens of the prompt with which a stream begins.
_CONTEXT_TOKENS: Final = 8
#: DecodeStream's complaint when a token makes the text before it different.
_INVALID_PREFIX = "Invalid prefix encountered"


@dataclass(frozen=True, slots=True)
class TextRules:
    """What of the tokens becomes text. ``min_tokens`` tokens pass before a stop string counts."""

    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special: bool = True
    spaces_between_special: bool = True
    min_tokens: int = 0


class OutputText:
    """One sample's text. Never lets a part of a stop string out."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], rules: TextRules) -> None:
        self._rules = rules
        self._decoder = _decoder(tokenizer, prompt, rules)
        self._held = ""
        self._tokens = 0

    def push(self, token_ids: Sequence[int], stopped: bool, over: bool) -> tuple[str, str | None]:
        """New text that may be shown, and the stop string that has been reached, if any.

        ``stopped``: the last token is one that ends the text, and no part of it. ``over``: no
        token follows.
        """
        rules = self._rules
        shown = token_ids[:-1] if stopped and not rules.include_stop else token_ids
        released = ""
        for token in shown:
            self._tokens += 1
            before = len(self._held)
            self._held += self._decoder.step(token)
            if self._tokens > rules.min_tokens and (found := self._stop(before)) is not None:
                stop, at = found
                return released + self._held[: at + rules.include_stop * len(stop)], stop
            free = len(self._held) - self._withheld()
            released, self._held = released + self._held[:free], self._held[free:]
        if over:
            released, self._held = released + self._held, ""
        return released, None

    def _stop(self, before: int) -> tuple[str, int] | None:
        """The stop string that ends first behind ``before`` in what is held, and its start."""
        found = [
            (self._held.find(stop, max(0, before - len(stop) + 1)), stop)
            for stop in self._rules.stop
        ]
        ends = [(at + len(stop), at, stop) for at, stop in found if at >= 0]
        if not ends:
            return None
        _, at, stop = min(ends, key=lambda entry: entry[0])
        return stop, at

    def _withheld(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        held = self._held
        longest = 0
        for stop in self._rules.stop:
            for size in range(min(len(stop) - 1, len(held)), longest, -1):
                if held.endswith(stop[:size]):
                    longest = size
                    break
        return longest


def _decoder(tokenizer: Tokenizer, prompt: Sequence[int], rules: TextRules) -> Any:
    backend = getattr(tokenizer.wrapper, "backend_tokenizer", None)
    if backend is not None:
        return _FastDecoder(backend, prompt, rules)
    return _SlowDecoder(tokenizer)


class _FastDecoder:
    """The tokenizers library's stream, begun behind the prompt: the first word keeps its space."""

    def __init__(self, backend: Any, prompt: Sequence[int], rules: TextRules) -> None:
        from tokenizers.decoders import DecodeStream

        self._make = DecodeStream
        self._backend = backend
        self._skip = rules.skip_special
        ids = _ending(backend, prompt)
        self._stream = DecodeStream(ids=ids, skip_special_tokens=rules.skip_special)
        self._added: dict[int, str] = {}
        self._after_added = False
        if not (rules.skip_special or rules.spaces_between_special):
            added = backend.get_added_tokens_decoder()
            self._added = {token: entry.content for token, entry in added.items()}

    def step(self, token: int) -> str:
        """The text that the token completes; "" inside a character of several tokens."""
        try:
            text = self._stream.step(self._backend, token)
        except Exception as error:
            if not str(error).startswith(_INVALID_PREFIX):
                raise
            self._stream = self._make(skip_special_tokens=self._skip)
            text = self._stream.step(self._backend, token)
        if self._added:
            special = self._added.get(token)
            if special is not None and self._after_added:
                text = special
            self._after_added = special is not None
        return text or ""


def _ending(backend: Any, prompt: Sequence[int]) -> list[int]:
    """The prompt's last tokens, from the beginning of a character on.

    What comes next depends on no more of it, and the stream's first step decodes all of it.
    """
    for count in range(_CONTEXT_TOKENS, 2 * _CONTEXT_TOKENS):
        ending = list(prompt[-count:])
        if "\ufffd" not in backend.decode(ending, skip_special_tokens=False):
            return ending
    return list(prompt)


class _SlowDecoder:
    """mlx-lm's streaming detokenizer, for tokenizers that are written in Python."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._stream = tokenizer.wrapper.detokenizer

    def step(self, token: int) -> str:
        """The text that the token completes."""
        self._stream.add_token(token)
        return str(self._stream.last_segment)
