"""Log-probabilities in the formats of both endpoints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Final, TypeVar

import msgspec

from mlx_receiver.http.openai.responses import (
    Alternative,
    ChatLogprobs,
    CompletionLogprobs,
    TokenLogprobs,
)
from mlx_receiver.http.openai.tokenizer import Tokenizer
from mlx_receiver.wire.messages import Logprobs

#: JSON has no infinity; vLLM writes this.
_LOWEST: Final = -9999.0

#: What a tokenizer decodes an incomplete character to, and the most tokens that hold one.
_INCOMPLETE: Final = "\ufffd"
_LONGEST_CHARACTER: Final = 4


def for_completion(
    rows: Sequence[Logprobs], count: int, names: Names, offset: int
) -> tuple[CompletionLogprobs, int]:
    """OpenAI's ``logprobs`` of completions, and the text offset behind it."""
    found = CompletionLogprobs()
    for row in rows:
        token = names.of(row.token_ids[0])
        found.text_offset.append(offset)
        found.token_logprobs.append(_finite(row.values[0]))
        found.tokens.append(token)
        found.top_logprobs.append({names.of(t): v for t, v in _alternatives(row, count)})
        offset += len(token)
        names.sampled(row.token_ids[0])
    return found, offset


_Found = TypeVar("_Found", CompletionLogprobs, ChatLogprobs)


def extend(whole: _Found, part: _Found) -> None:
    """Add those of later tokens.

    Each entry becomes JSON now: an answer may have a million of them.
    """
    for name in part.__struct_fields__:
        values = getattr(part, name)
        if values and isinstance(values[0], dict | msgspec.Struct):
            values = [msgspec.Raw(msgspec.json.encode(value)) for value in values]
        getattr(whole, name).extend(values)


def for_chat(
    rows: Iterable[Logprobs], count: int, names: Names, named: bool = False
) -> ChatLogprobs:
    """OpenAI's ``logprobs`` of chat completions; where tokens were ``named``, the sampled one is
    among the alternatives."""

    def told(token: int, value: float) -> tuple[str, float, list[int]]:
        name = names.of(token)
        return name, _finite(value), list(name.encode())

    found = ChatLogprobs()
    for row in rows:
        sampled = told(row.token_ids[0], row.values[0])
        others: Iterable[tuple[int, float]]
        others = zip(row.token_ids[1 : count + 1], row.values[1:], strict=False)
        if named:
            others = _alternatives(row, count)
        alternatives = [Alternative(*told(token, value)) for token, value in others]
        found.content.append(TokenLogprobs(*sampled, alternatives))
        names.sampled(row.token_ids[0])
    return found


class Names:
    """What tokens are called at one place of a text: ``before`` holds what was sampled so far.

    A token that holds a part of a character only has no text; the character's last one has it all,
    as in vLLM's answers.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int], as_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._before = list(before[-_LONGEST_CHARACTER:])
        self._as_ids = as_ids

    def sampled(self, token: int) -> None:
        """Go on behind this token."""
        self._before = [*self._before, token][-_LONGEST_CHARACTER:]

    def of(self, token: int) -> str:
        """The token's text, or its id where ids are wanted."""
        if self._as_ids:
            return f"token_id:{token}"
        decode = self._tokenizer.decode
        alone = self._tokenizer.name(token)
        if not alone.endswith(_INCOMPLETE):
            return alone
        for count in range(1, len(self._before) + 1):
            context = self._before[-count:]
            joined = decode([*context, token])
            if joined.endswith(_INCOMPLETE):
                continue
            while context and self._tokenizer.name(context[-1]).endswith(_INCOMPLETE):
                context.pop()
            shown = decode(context) if context else ""
            same = takewhile(lambda pair: pair[0] == pair[1], zip(shown, joined, strict=False))
            return joined[sum(1 for _ in same) :]
        return ""


def _alternatives(row: Logprobs, count: int) -> list[tuple[int, float]]:
    """The sampled token and the ``count`` likeliest, each once."""
    both = zip(row.token_ids[: count + 1], row.values, strict=False)
    return [(token, _finite(value)) for token, value in dict(both).items()]


def _finite(value: float) -> float:
    return max(value, _LOWEST)
