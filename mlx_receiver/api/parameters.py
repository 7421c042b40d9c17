"""From a request's fields to what the engine and the detokenizer are told, as vLLM reads them."""

from __future__ import annotations

import json
from typing import Any, Final

from mlx_receiver.api.bodies import ChatBody, CompletionBody, SamplingBody
from mlx_receiver.api.errors import bad_request
from mlx_receiver.api.text import TextRules
from mlx_receiver.api.tokenizer import Tokenizer
from mlx_receiver.model import ModelSource
from mlx_receiver.wire.messages import Sampling

#: Most alternatives per token, as vLLM's ``--max-logprobs`` has it.
MAX_LOGPROBS: Final = 20
#: Most samples of one request; each is a row of the batch.
MAX_SAMPLES: Final = 128

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


def sampling(
    body: SamplingBody, defaults: Defaults, tokenizer: Tokenizer, room: int, sample: int
) -> Sampling:
    """How sample number ``sample`` is drawn; ``room`` tokens fit behind the prompt.

    Raises ApiError for values that no engine accepts; ``check_sampling`` looks at the rest.
    """
    values = {
        name: default if (given := getattr(body, name)) is None else given
        for name, default in defaults.values.items()
    }
    values["top_k"] = max(values["top_k"], 0)
    limit = _max_tokens(body, defaults, room)
    if (body.min_tokens or 0) < 0 or (body.min_tokens or 0) > limit:
        raise bad_request(f"min_tokens must be in 0..{limit}", "min_tokens")
    eos = tokenizer.eos_token_id
    stops = set(body.stop_token_ids or ())
    if body.ignore_eos:
        eos = None
    else:
        stops |= defaults.eos - {eos}
    return Sampling(
        max_tokens=limit,
        min_tokens=body.min_tokens or 0,
        seed=None if body.seed is None else body.seed + sample,
        logit_bias=_logit_bias(body),
        allowed_token_ids=body.allowed_token_ids,
        bad_words_token_ids=_bad_words(body.bad_words or [], tokenizer) or None,
        eos_token_id=eos,
        stop_token_ids=sorted(stops),
        logprobs=_logprobs(body),
        **values,
    )


def text_rules(body: SamplingBody) -> TextRules:
    """Stop strings and special tokens. Raises ApiError for an empty stop string."""
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    if not all(stop):
        raise bad_request("a stop string is empty", "stop")
    return TextRules(
        stop=stop,
        include_stop=bool(body.include_stop_str_in_output),
        skip_special=body.skip_special_tokens is not False,
        spaces_between_special=body.spaces_between_special_tokens is not False,
        min_tokens=body.min_tokens or 0,
    )


def samples(body: SamplingBody) -> int:
    """``n``. Raises ApiError when it is out of range."""
    wanted = 1 if body.n is None else body.n
    if not 1 <= wanted <= MAX_SAMPLES:
        raise bad_request(f"n must be in 1..{MAX_SAMPLES}", "n")
    return wanted


def _max_tokens(body: SamplingBody, defaults: Defaults, room: int) -> int:
    wanted = body.max_tokens
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
        wanted = body.max_completion_tokens
    if wanted is None:
        wanted = room if defaults.max_tokens is None else defaults.max_tokens
    if wanted < 1:
        raise bad_request(f"max_tokens must be at least 1, not {wanted}", "max_tokens")
    return min(wanted, max(room, 1))


def _logprobs(body: SamplingBody) -> int | None:
    if isinstance(body, CompletionBody):
        wanted = body.logprobs
    else:
        assert isinstance(body, ChatBody)
        if body.top_logprobs and not body.logprobs:
            raise bad_request("top_logprobs needs logprobs to be true", "top_logprobs")
        wanted = (body.top_logprobs or 0) if body.logprobs else None
    if wanted is not None and not 0 <= wanted <= MAX_LOGPROBS:
        raise bad_request(f"log-probabilities of 0..{MAX_LOGPROBS} tokens, not {wanted}")
    return wanted


def _logit_bias(body: SamplingBody) -> dict[int, float] | None:
    if not body.logit_bias:
        return None
    try:
        return {int(k): min(100.0, max(-100.0, v)) for k, v in body.logit_bias.items()}
    except ValueError:
        raise bad_request("logit_bias maps token ids to numbers", "logit_bias") from None


def _bad_words(words: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Token sequences of each word, at a text's beginning and after a space.

    As ``SamplingParams.update_from_tokenizer`` of vLLM does it.
    """
    found: list[list[int]] = []
    for word in words:
        plain = tokenizer.encode(word.lstrip(), special=False)
        if not plain:
            raise bad_request("a bad word is empty", "bad_words")
        found.append(plain)
        spaced = tokenizer.encode(" " + word.lstrip(), special=False)
        if spaced and spaced[0] != plain[0] and len(spaced) == len(plain):
            found.append(spaced)
    return found
