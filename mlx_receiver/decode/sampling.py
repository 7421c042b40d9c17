"""vLLM's sampling semantics in MLX: masks, penalties, temperature, truncation, stopping.

The order is that of ``vllm/v1/sample/sampler.py``: what the grammar allows; log-probabilities of
those logits; allowed ids, bad words, min_tokens, logit bias; penalties; what ends a reasoning that
is too long; then temperature, min_p, top_k and top_p. Everything stays lazy in MLX: nothing here
waits for a token, so the decode pipeline is never held up. Whoever decodes tells a sampler that
``follows`` its text of each token (``RequestSampler.accept``).
"""

from __future__ import annotations

import functools
import math
import random
from collections import deque
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from mlx_receiver.decode.grammar.matcher import Matcher
from mlx_receiver.wire import thinking, trust
from mlx_receiver.wire.messages import E_UNSUPPORTED, Logprobs, WireError
from mlx_receiver.wire.ranges import MAX_BAD_WORDS_TOKENS
from mlx_receiver.wire.sampling import Sampling

#: Below this temperature vLLM samples greedily (``_SAMPLING_EPS``).
GREEDY_BELOW = 1e-5

_LOWEST = -math.inf

#: A forced token's logit in vLLM; nothing that is there before or comes afterwards outweighs it.
_FORCED = 1e9

Sampler = Callable[[mx.array], mx.array]
Processor = Callable[[mx.array, mx.array], mx.array]


def check_sampling(sampling: Sampling, vocab_size: int) -> None:
    """Raise WireError (``unsupported``) naming the first value that cannot be honoured."""
    trust.validated(sampling, vocab_size, E_UNSUPPORTED)
    check_bad_words(sampling)


def check_bad_words(sampling: Sampling) -> None:
    """Raise WireError (``unsupported``) for too many tokens of bad words, all together."""
    tokens = sum(map(len, sampling.bad_words_token_ids or ()))
    if tokens > MAX_BAD_WORDS_TOKENS:
        raise WireError(
            E_UNSUPPORTED,
            f"Sampling.bad_words_token_ids: {tokens} tokens, at most {MAX_BAD_WORDS_TOKENS}",
        )


def greedy(logprobs: mx.array) -> mx.array:
    """The likeliest token of each row ``[rows, vocab]``."""
    return mx.argmax(logprobs, axis=-1)


class RequestSampler:
    """How one request samples. ``sampler`` and ``processors`` go to ``BatchGenerator.insert``.

    A greedy request without extras gets the one shared ``greedy`` and no processors: batches of
    them are sampled in a single call. ``outputs`` is the number of output tokens that exist
    already, vLLM's first token included.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt_token_ids: Sequence[int],
        outputs: int,
        vocab_size: int,
        grammar: Matcher | None = None,
    ) -> None:
        #: Where the text is in its grammar, if it has one.
        self.grammar = grammar
        told = sampling.thinking
        self._budget = None if told is None else thinking.follow(told, prompt_token_ids)
        self._sampling = sampling
        self._prompt_tokens = len(prompt_token_ids)
        self._sampled = outputs
        self._processed = outputs
        self._raw: mx.array | None = None
        self._records: deque[list[mx.array]] = deque()
        self._draw = _draw_function(
            sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, vocab_size
        )
        self._counted = outputs and outputs - 1
        s = sampling
        self._penalised = (s.repetition_penalty, s.presence_penalty, s.frequency_penalty) != (
            1.0,
            0.0,
            0.0,
        )
        if self._penalised:
            seen = np.zeros(vocab_size, np.bool_)
            seen[np.asarray(prompt_token_ids, np.int64)] = True
            self._in_prompt = mx.array(seen)
            self._counts = mx.zeros(vocab_size, mx.int32)
        self._static = _static_bias(sampling, vocab_size)
        self._phrases = [words for words in s.bad_words_token_ids or () if len(words) > 1]
        self._ends = s.ends
        holds_back = bool(self._ends) and outputs < s.min_tokens

        self.sampler: Sampler
        if s.logprobs is not None or (s.seed is not None and self._draw is not greedy):
            self.sampler = self._sample
        else:
            self.sampler = self._draw
        self.processors: list[Processor] = []
        biased = self._static or self._phrases or holds_back or self._penalised or s.logit_bias
        if biased or self.follows:
            self.processors = [self._process]

    @property
    def follows(self) -> bool:
        """Whether what may come next depends on the token before."""
        return self.grammar is not None or self._budget is not None

    def accept(self, token: int) -> None:
        """Note the text's next token."""
        if self.grammar is not None:
            self.grammar.accept(token)
        if self._budget is not None:
            self._budget.accept(token)

    def draw(self, context: Sequence[int], logits: mx.array) -> mx.array:
        """A token after ``context`` (prompt and output), as ``BatchGenerator`` draws one.

        ``logits`` is ``[1, vocab]``, the result ``[1]``.
        """
        for process in self.processors:
            logits = process(mx.array(context), logits)
        return self.sampler(logits - mx.logsumexp(logits, axis=-1, keepdims=True))

    def pop_logprobs(self) -> Logprobs | None:
        """Log-probabilities of the next token not yet asked for; None when none are wanted."""
        if not self._records:
            return None
        token, value, rank, ids, values = self._records.popleft()
        found = [float(value.item()), *values.tolist()]
        return Logprobs(
            [int(token.item()), *ids.tolist()],
            # Where nothing can come at all, they are no numbers.
            [_LOWEST if math.isnan(value) else value for value in found],
            max(1, int(rank.item())),
        )

    def _process(self, context: mx.array, logits: mx.array) -> mx.array:
        """The processed logits ``[1, vocab]``; ``context`` is prompt and output so far."""
        s = self._sampling
        outputs = self._processed
        self._processed += 1
        if self.grammar is not None and (mask := self.grammar.allowed()) is not None:
            logits = mx.where(mx.array(mask), logits, _LOWEST)
        self._raw = logits
        # A second handle: the assignments below would change what the first one names.
        logits = mx.array(logits)
        if self._static:
            allowed, banned = self._static
            if allowed is not None:
                logits = mx.where(allowed, logits, _LOWEST)
            if banned is not None:
                logits = mx.where(banned, _LOWEST, logits)
        for words in self._phrases:
            *prefix, last = words
            if len(prefix) <= outputs:
                found = mx.all(context[-len(prefix) :] == mx.array(prefix))
                logits[:, last] = mx.where(found, _LOWEST, logits[:, last])
        if outputs < s.min_tokens and self._ends:
            logits[:, mx.array(self._ends)] = _LOWEST
        if s.logit_bias:
            biased = mx.array(list(s.logit_bias))
            logits[:, biased] = logits[:, biased] + mx.array(list(s.logit_bias.values()))
        if self._penalised:
            logits = self._penalise(context, logits, outputs)
        if self._budget is not None and (forced := self._budget.forced) is not None:
            logits[:, forced] = _FORCED
        return logits

    def _penalise(self, context: mx.array, logits: mx.array, outputs: int) -> mx.array:
        s = self._sampling
        if outputs > self._counted:
            new = context[-(outputs - self._counted) :]
            self._counts = self._counts.at[new].add(1)
            self._counted = outputs
        in_output = self._counts > 0
        if s.repetition_penalty != 1.0:
            penalty = s.repetition_penalty
            penalised = mx.where(logits > 0, logits / penalty, logits * penalty)
            logits = mx.where(self._in_prompt | in_output, penalised, logits)
        logits = logits - s.frequency_penalty * self._counts
        return logits - s.presence_penalty * in_output

    def _sample(self, logprobs: mx.array) -> mx.array:
        s = self._sampling
        if self._draw is greedy or s.seed is None:
            token = self._draw(logprobs)
        else:
            # A key for each position rather than a running state: the draw depends on nothing else.
            key = mx.random.key(_mix(s.seed, self._sampled))
            token = self._draw(logprobs, key)
        self._sampled += 1
        if s.logprobs is not None:
            raw = logprobs
            if self._raw is not None:
                raw = self._raw - mx.logsumexp(self._raw, axis=-1, keepdims=True)
            record = _logprobs(raw[0], token, s.logprobs, s.logprob_token_ids)
            # Started now, in the same step; read one step later, when it has long been done.
            mx.async_eval(record)
            self._records.append(record)
        return token


def _static_bias(
    sampling: Sampling, vocab_size: int
) -> tuple[mx.array | None, mx.array | None] | None:
    """Masks ``[vocab]`` of allowed and of banned tokens that never change; None without any."""
    single = [words[0] for words in sampling.bad_words_token_ids or () if len(words) == 1]
    if sampling.allowed_token_ids is None and not single:
        return None

    def mask(ids: list[int]) -> mx.array:
        marked = np.zeros(vocab_size, np.bool_)
        marked[ids] = True
        return mx.array(marked)

    allowed = sampling.allowed_token_ids
    return (None if allowed is None else mask(allowed), mask(single) if single else None)


@functools.lru_cache(maxsize=256)
def _draw_function(
    temperature: float, top_k: int, top_p: float, min_p: float, vocab_size: int
) -> Callable[..., mx.array]:
    """A sampler of rows ``[rows, vocab]``; equal parameters share one, so that batches do too."""
    if temperature < GREEDY_BELOW:
        return greedy
    k = top_k if 0 < top_k < vocab_size else 0

    def draw(logprobs: mx.array, key: mx.array | None = None) -> mx.array:
        logits = truncate(logprobs / temperature, k, top_p, min_p)
        if key is None:
            # MLX's global generator is shared by every thread of the process.
            key = mx.random.key(random.getrandbits(63))
        return mx.random.categorical(logits, axis=-1, key=key)

    return draw


def truncate(logits: mx.array, top_k: int, top_p: float, min_p: float) -> mx.array:
    """Logits ``[rows, vocab]`` with -inf where they are cut off; ``top_k`` 0 cuts nothing."""
    if min_p > 0:
        probabilities = mx.softmax(logits, axis=-1)
        least = probabilities.max(axis=-1, keepdims=True) * min_p
        logits = mx.where(probabilities < least, _LOWEST, logits)
    if top_p < 1:
        return _top_k_top_p(logits, top_k, top_p)
    if top_k:
        least = mx.topk(logits, top_k, axis=-1).min(axis=-1, keepdims=True)
        logits = mx.where(logits < least, _LOWEST, logits)
    return logits


def _top_k_top_p(logits: mx.array, k: int, p: float) -> mx.array:
    """``apply_top_k_top_p_pytorch`` of vLLM's ``topk_topp_sampler``; ``k`` 0 means all."""
    order = mx.argsort(logits, axis=-1)
    ascending = mx.take_along_axis(logits, order, axis=-1)
    if k:
        least = ascending[:, -k : ascending.shape[-1] - k + 1]
        ascending = mx.where(ascending < least, _LOWEST, ascending)
    below = mx.cumsum(mx.softmax(ascending, axis=-1), axis=-1) <= 1 - p
    below[:, -1] = False
    ascending = mx.where(below, _LOWEST, ascending)
    return mx.put_along_axis(logits, order, ascending, axis=-1)


def _logprobs(
    raw: mx.array, token: mx.array, count: int, named: Sequence[int] = ()
) -> list[mx.array]:
    """Sampled token, its value and rank, the ``named`` tokens, else the ``count`` likeliest, and
    their values."""
    value = raw[token]
    rank = mx.sum(raw >= value)
    if named:
        likeliest = mx.array(list(named), mx.uint32)
    elif count:
        likeliest = mx.argpartition(-raw, kth=min(count, raw.size) - 1)[:count]
        likeliest = likeliest[mx.argsort(-raw[likeliest])]
    else:
        likeliest = mx.array([], mx.uint32)
    return [token, value, rank, likeliest, raw[likeliest]]


def _mix(seed: int, position: int) -> int:
    """A 64-bit key from a seed and a position (SplitMix64's finaliser)."""
    z = (seed * 0x9E3779B97F4A7C15 + position + 1) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
    z = (z ^ z >> 27) * 0x94D049BB133111EB & (1 << 64) - 1
    return z ^ z >> 31
