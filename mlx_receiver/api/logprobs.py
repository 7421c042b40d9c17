"""Log-probabilities in the formats of both endpoints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from mlx_receiver.api.tokenizer import Tokenizer
from mlx_receiver.wire.messages import Logprobs

#: JSON has no infinity; vLLM writes this.
_LOWEST: Final = -9999.0


def for_completion(
    rows: Sequence[Logprobs], count: int, tokenizer: Tokenizer, offset: int, as_ids: bool
) -> tuple[dict[str, Any], int]:
    """OpenAI's ``logprobs`` of completions, and the text offset behind it."""
    tokens, offsets = [], []
    for row in rows:
        token = _name(row.token_ids[0], tokenizer, as_ids)
        tokens.append(token)
        offsets.append(offset)
        offset += len(token)
    found = {
        "text_offset": offsets,
        "token_logprobs": [_finite(row.values[0]) for row in rows],
        "tokens": tokens,
        "top_logprobs": [
            {_name(t, tokenizer, as_ids): v for t, v in _alternatives(row, count)} for row in rows
        ],
    }
    return found, offset


def for_chat(
    rows: Iterable[Logprobs], count: int, tokenizer: Tokenizer, as_ids: bool
) -> dict[str, Any]:
    """OpenAI's ``logprobs`` of chat completions."""

    def entry(token: int, value: float) -> dict[str, Any]:
        name = _name(token, tokenizer, as_ids)
        return {"token": name, "logprob": value, "bytes": list(name.encode())}

    return {
        "content": [
            {
                **entry(row.token_ids[0], _finite(row.values[0])),
                "top_logprobs": [
                    entry(t, _finite(v))
                    for t, v in zip(row.token_ids[1 : count + 1], row.values[1:], strict=False)
                ],
            }
            for row in rows
        ]
    }


def _alternatives(row: Logprobs, count: int) -> list[tuple[int, float]]:
    """The sampled token and the ``count`` likeliest, each once."""
    both = zip(row.token_ids[: count + 1], row.values, strict=False)
    return [(token, _finite(value)) for token, value in dict(both).items()]


def _finite(value: float) -> float:
    return max(value, _LOWEST)


def _name(token: int, tokenizer: Tokenizer, as_ids: bool) -> str:
    return f"token_id:{token}" if as_ids else tokenizer.decode([token])
