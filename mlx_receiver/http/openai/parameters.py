"""From a request's fields to what the engine and the detokenizer are told, as vLLM reads them."""

from __future__ import annotations

import json
import re
from typing import Any, Final

import msgspec

from mlx_receiver.decode.model import ModelSource
from mlx_receiver.http.errors import bad_request
from mlx_receiver.http.openai.bodies import ChatBody, CompletionBody, SamplingBody
from mlx_receiver.http.openai.structured import grammar_of
from mlx_receiver.http.openai.text import TextRules
from mlx_receiver.http.openai.tokenizer import Tokenizer
from mlx_receiver.wire.messages import clipped
from mlx_receiver.wire.ranges import MAX_BAD_WORDS, MAX_BAD_WORDS_TOKENS, MAX_INT
from mlx_receiver.wire.sampling import Sampling, Thinking

#: vLLM raises lower temperatures to this, except 0.
_LOWEST_TEMPERATURE: Final = 0.01

#: Fields that a model's generation_config.json may set for requests that do not.
_DEFAULTED: Final = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}

_TOKEN_ID: Final = re.compile(r"[+-]?\d{1,20}")


class Defaults:
    """What the model's own generation_config.json says, as vLLM applies it."""

    def __init__(self, source: ModelSource) -> None:
        try:
            config = json.loads((source.path / "generation_config.json").read_text())
        except (OSError, ValueError):
            config = {}
        self.values: dict[str, Any] = {
            name: value if config.get(name) is None else config[name]
            for name, value in _DEFAULTED.items()
        }
        self.max_tokens: int | None = config.get("max_new_tokens")
        eos = config.get("eos_token_id", [])
        self.eos: set[int] = {eos} if isinstance(eos, int) else set(eos or [])


def sampling(body: SamplingBody, defaults: Defaults, tokenizer: Tokenizer) -> Sampling:
    """How a request's samples are drawn, before ``fitted`` makes it the one of a sample.

    Raises ApiError for values that no engine accepts; ``check_sampling`` looks at the rest.
    """
    values = {
        name: default if (given := getattr(body, name)) is None else given
        for name, default in defaults.values.items()
    }
    values["top_k"] = min(max(values["top_k"], 0), MAX_INT)
    if 0 < values["temperature"] < _LOWEST_TEMPERATURE:
        values["temperature"] = _LOWEST_TEMPERATURE
    if (body.n or 1) > 1 and values["temperature"] == 0:
        raise bad_request(f"n must be 1 when using greedy sampling, got {body.n}", "n")
    limit = _max_tokens(body, defaults)
    if body.min_tokens > limit:
        raise bad_request(f"min_tokens must be in 0..{limit}", "min_tokens")
    eos = tokenizer.eos_token_id
    stops = set(body.stop_token_ids or ())
    grammar = grammar_of(body)
    # Held back by ``min_tokens``, and allowed at a grammar's end, although they may be ignored.
    ends = stops | defaults.eos | ({eos} if eos is not None else set())
    if body.ignore_eos:
        eos = None
    else:
        stops |= defaults.eos - {eos}
    return Sampling(
        max_tokens=limit,
        min_tokens=body.min_tokens,
        seed=None if body.seed == -1 else body.seed,
        logit_bias=_logit_bias(body),
        allowed_token_ids=body.allowed_token_ids,
        bad_words_token_ids=_bad_words(body.bad_words, tokenizer) or None,
        eos_token_id=eos,
        stop_token_ids=sorted(stops),
        logprobs=_logprobs(body),
        logprob_token_ids=body.logprob_token_ids or [],
        end_token_ids=sorted(ends) if body.min_tokens or grammar else [],
        grammar=grammar,
        thinking=_thinking(body, tokenizer),
        **values,
    )


def fitted(sampling: Sampling, room: int, index: int) -> Sampling:
    """The sampling of sample number ``index`` of a prompt behind which ``room`` tokens fit.

    Raises ApiError when ``min_tokens`` do not.
    """
    if sampling.min_tokens > room:
        raise bad_request(f"min_tokens must be in 0..{room}", "min_tokens")
    seed = sampling.seed
    if seed is not None:
        # The sum stays an int64.
        seed = (seed + index + 2**63) % 2**64 - 2**63
    return msgspec.structs.replace(sampling, max_tokens=min(sampling.max_tokens, room), seed=seed)


def text_rules(body: SamplingBody) -> TextRules:
    """Stop strings and special tokens."""
    return TextRules(
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        include_stop=body.include_stop_str_in_output,
        skip_special=body.skip_special_tokens,
        spaces_between_special=body.spaces_between_special_tokens,
        min_tokens=body.min_tokens,
    )


def _max_tokens(body: SamplingBody, defaults: Defaults) -> int:
    wanted = body.max_tokens
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
        wanted = body.max_completion_tokens
    if wanted is None:
        wanted = defaults.max_tokens
    return MAX_INT if wanted is None else min(wanted, MAX_INT)


def _logprobs(body: SamplingBody) -> int | None:
    if body.logprob_token_ids:
        return len(body.logprob_token_ids)
    if isinstance(body, CompletionBody):
        return body.logprobs
    assert isinstance(body, ChatBody)
    return (body.top_logprobs or 0) if body.logprobs else None


def _thinking(body: SamplingBody, tokenizer: Tokenizer) -> Thinking | None:
    """The budget, -1 being none, by the rule of vLLM's model runner V2."""
    budget = body.thinking_token_budget
    if budget is None or budget < 0:
        return None
    marks = tokenizer.reasoning
    if marks is None:
        raise bad_request(
            "thinking_token_budget needs a model whose tokenizer has tokens for reasoning, such as "
            "<think> and </think>",
            "thinking_token_budget",
        )
    start, end = marks
    return Thinking(min(budget, MAX_INT), start, end, end, "v2")


def _logit_bias(body: SamplingBody) -> dict[int, float] | None:
    if not body.logit_bias:
        return None
    bad = [clipped(key, 64) for key in body.logit_bias if not _TOKEN_ID.fullmatch(key)]
    if bad:
        keys = clipped(", ".join(map(repr, bad)), 1024)
        raise bad_request(f"logit_bias has keys that are no token ids: {keys}", "logit_bias")
    return {int(key): min(100.0, max(-100.0, value)) for key, value in body.logit_bias.items()}


def _bad_words(words: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Token sequences of each word, at a text's beginning and after a space.

    As ``SamplingParams.update_from_tokenizer`` of vLLM does it.
    """
    found: list[list[int]] = []
    for word in dict.fromkeys(words):
        plain = tokenizer.encode(word.lstrip(), special=False)
        if not plain:
            raise bad_request("a bad word is empty", "bad_words")
        found.append(plain)
        spaced = tokenizer.encode(" " + word.lstrip(), special=False)
        if spaced and spaced[0] != plain[0] and len(spaced) == len(plain):
            found.append(spaced)
        if len(found) > MAX_BAD_WORDS or sum(map(len, found)) > MAX_BAD_WORDS_TOKENS:
            raise bad_request(
                f"bad_words are more than {MAX_BAD_WORDS} sequences or {MAX_BAD_WORDS_TOKENS} "
                "tokens",
                "bad_words",
            )
    return found
