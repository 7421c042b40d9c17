"""How a text is sampled: what vLLM's clients ask for, in the wire's words."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from mlx_receiver.wire.ranges import (
    MAX_BAD_WORDS,
    MAX_BAD_WORDS_TOKENS,
    MAX_GRAMMAR,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_MARK_TOKENS,
    MAX_STOP_TOKENS,
    Count,
    Positive,
    TokenId,
)

GrammarKind = Literal["json", "regex", "choice", "grammar", "structural_tag"]


class Grammar(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a text has to conform to, as the client of vLLM's API wrote it.

    ``text`` is by ``kind`` a JSON schema; a regular expression for the whole text; a JSON list of
    the texts to choose from; a grammar in EBNF or Lark; a structural tag in JSON.
    ``closed``: where a schema lists properties or first items and does not say whether there may be
    others, there may not. ``compact``: no white space between JSON's symbols.
    ``after``: it constrains what follows this token, which ends the model's reasoning; None: the
    whole text.
    """

    kind: GrammarKind
    text: Annotated[str, Meta(max_length=MAX_GRAMMAR)]
    closed: bool = False
    compact: bool = False
    after: TokenId | None = None


Mark = Annotated[list[TokenId], Meta(min_length=1, max_length=MAX_MARK_TOKENS)]


class Thinking(msgspec.Struct, frozen=True):
    """How many tokens the model may reason: ``thinking_token_budget``.

    ``start`` begins the reasoning, ``end`` ends it, and ``forced`` is what comes when the budget
    is spent. ``runner`` is vLLM's model runner, whose rule holds (``thinking``).
    """

    budget: Count
    start: Mark
    end: Mark
    forced: Mark
    runner: Literal["v1", "v2"]


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the receiver samples; every field means what vLLM's ``SamplingParams`` says.

    ``max_tokens`` and ``min_tokens`` count from the first output token, the one that vLLM
    sampled itself. ``eos_token_id`` ends the text with ``stop_reason`` None, a member of
    ``stop_token_ids`` with ``stop_reason`` set to itself. ``logprobs`` is the number of
    alternatives per token (None: none wanted); where ``logprob_token_ids`` are given, those are the
    alternatives, as many. ``end_token_ids`` are the tokens that ``min_tokens`` holds back and that
    ``grammar`` allows where the text may end; without any, those that end the text.
    """

    max_tokens: Positive
    min_tokens: Count = 0
    temperature: Annotated[float, Meta(ge=0)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Count = 0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0)] = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Annotated[dict[TokenId, float], Meta(max_length=MAX_LOGIT_BIAS)] | None = None
    allowed_token_ids: Annotated[list[TokenId], Meta(min_length=1)] | None = None
    bad_words_token_ids: (
        Annotated[
            list[Annotated[list[TokenId], Meta(min_length=1, max_length=MAX_BAD_WORDS_TOKENS)]],
            Meta(max_length=MAX_BAD_WORDS),
        ]
        | None
    ) = None
    eos_token_id: TokenId | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOP_TOKENS)] = []
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    logprob_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_LOGPROBS)] = []
    end_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOP_TOKENS)] = []
    grammar: Grammar | None = None
    thinking: Thinking | None = None

    @property
    def ends(self) -> list[int]:
        """The tokens that ``min_tokens`` holds back, in order."""
        given = {*self.stop_token_ids, self.eos_token_id} - {None}
        return sorted(self.end_token_ids or (token for token in given if token is not None))
