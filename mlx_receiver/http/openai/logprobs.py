"""Log-probabilities in the formats of both endpoints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any, Final

import msgspec

from mlx_receiver.http.openai.tokenizer import Tokenizer
from mlx_receiver.wire.messages import Logprobs

#: JSON has no infinity; vLLM writes this.
_LOWEST: Final = -9999.0

#: What a tokenizer decodes an incomplete character to, and the most tokens that hold one.
_INCOMPLETE: Final = "\ufffd"
_LONGEST_CHARACTER: Final = 4


def for_completion(
    rows: Sequence[Logprobs], count: int, names: Names, offset: int
) -> tuple[dict[str, Any], int]:
    """OpenAI's ``logprobs`` of completions, and the text offset behind it."""
    tokens, offsets, likeliest = [], [], []
    for row in rows:
        token = names.of(row.token_ids[0])
        tokens.append(token)
        offsets.append(offset)
        likeliest.append({names.of(t): v for t, v in _alternatives(row, count)})
        offset += len(token)
        names.sampled(row.token_ids[0])
    found = {
        "text_offset": offsets,
        "token_logprobs": [_finite(row.values[0]) for row in rows],
        "tokens": tokens,
        "top_logprobs": likeliest,
    }
    return found, offset


def extend(whole: dict[str, list[Any]], part: dict[str, list[Any]]) -> None:
    """Add what ``for_completion`` or ``for_chat`` returned for later tokens.

    Each entry becomes JSON now: an answer may have a million of them.
    """
    for name, values in part.items():
        if values and isinstance(values[0], dict):
            values = [msgspec.Raw(msgspec.json.encode(value)) for value in values]
        whole.setdefault(name, []).extend(values)


def for_chat(rows: Iterable[Logprobs], count: int, names: Names) -> dict[str, Any]:
    """OpenAI's ``logprobs`` of chat completions."""

    def entry(token: int, value: float) -> dict[str, Any]:
        name = names.of(token)
        return {"token": name, "logprob": _finite(value), "bytes": list(name.encode())}

    content = []
    for row in rows:
        alternatives = zip(row.token_ids[1 : count + 1], row.values[1:], strict=False)
        content.append(
            entry(row.token_ids[0], row.values[0])
            | {"top_logprobs": [entry(token, value) for token, value in alternatives]}
        )
        names.sampled(row.token_ids[0])
    return {"content": content}


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
