"""In bf16 a hand-off is no farther from MLX alone than vLLM alone is.

vLLM prefills and samples the first token; the log-probabilities of the second token are the first
that the receiver computes. They are compared with MLX's own prefill of the same tokens, and with
the same request decoded by vLLM. The two engines round bf16 in different places, so they differ
without any hand-off: that difference is the yardstick.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_map
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model, load_tokenizer

from tests.servers import Vllm, pair

pytestmark = [pytest.mark.server, pytest.mark.real_model]

BF16 = ("--dtype", "bfloat16")
TOP = 20
#: Any plugin's argument keeps a request local, see `vllm_mac_decode.scheduler.eligibility`.
LOCAL = {"vllm_xargs": {"keep": "local"}}

_STORY = (
    "The harbour was quiet when the first boats came back. Nobody had expected them before noon, "
    "and the women who mended the nets looked up one after the other, counting sails. "
)
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Water boils at 100 degrees Celsius at sea level. On a high mountain it boils at",
    "<|im_start|>user\nName three animals that live in the sea.<|im_end|>\n<|im_start|>assistant\n",
    "1, 1, 2, 3, 5, 8, 13, 21,",
    "To be, or not to be, that is the question:",
    "Dear Sir or Madam,\n\nI am writing to",
    "SELECT name, age FROM users WHERE",
    "The three laws of thermodynamics say that",
    "Ingredients: 200 g flour, 2 eggs, 1 pinch of salt.\nMethod:",
    "Q: Who wrote Faust?\nA:",
    "In 1969 the first people",
    "import numpy as np\n\nx = np.",
    "Once upon a time there was a",
    "The difference between a virus and a bacterium is",
    "<|im_start|>user\nWrite a haiku about rain.<|im_end|>\n<|im_start|>assistant\n",
    _STORY + "The youngest of them said:",
    _STORY * 2 + "Then",
    _STORY * 6 + "In the evening",
    _STORY * 10 + "At last",
)

#: Log-probabilities of the likeliest tokens at one position, by token id.
Top = dict[int, float]


@dataclass
class Difference:
    """How far ``b`` is from ``a`` at one position, over the tokens that both list."""

    kl: float
    largest: float

    @classmethod
    def of(cls, a: Top, b: Top) -> Difference:
        shared = a.keys() & b.keys()
        assert len(shared) >= TOP // 2
        # Of the distributions over the shared tokens: without the tail it would not be one.
        tail_a, tail_b = (math.log(math.fsum(math.exp(d[t]) for t in shared)) for d in (a, b))
        kl = math.fsum(math.exp(a[t] - tail_a) * (a[t] - tail_a - b[t] + tail_b) for t in shared)
        return cls(kl, max(abs(a[t] - b[t]) for t in shared))


class MlxAlone:
    """mlx-lm's own model and prefill."""

    def __init__(self, path: Path, dtype: mx.Dtype) -> None:
        self.model, _ = load_model(path)
        self.model.update(tree_map(lambda p: p.astype(dtype), self.model.parameters()))

    def prefill(self, prompt: list[int]) -> list[Any]:
        cache: list[Any] = make_prompt_cache(self.model)
        self.model.model(mx.array([prompt]), cache=cache)
        mx.eval([layer.state for layer in cache])
        return cache

    def top(self, cache: list[Any], token: int) -> Top:
        logits = self.model(mx.array([[token]]), cache=cache)[0, -1].astype(mx.float32)
        logprobs = logits - mx.logsumexp(logits)
        likeliest = mx.argsort(-logprobs)[:TOP].tolist()
        return {token: logprobs[token].item() for token in likeliest}


class Yardsticks:
    """MLX alone, in bf16 and in fp32; in a thread, because prefill takes a while."""

    def __init__(self, path: Path) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._ready = self._thread.submit(self._prefill, path)

    def tops(self, tokens: list[list[int]]) -> list[tuple[Top, Top]]:
        """For each prompt with its first token."""
        prompts = [row[:-1] for row in tokens]
        assert self._ready.result() == prompts
        return self._thread.submit(
            lambda: [
                (self._bf16.top(a, row[-1]), self._fp32.top(b, row[-1]))
                for row, a, b in zip(tokens, *self._caches, strict=True)
            ]
        ).result()

    def _prefill(self, path: Path) -> list[list[int]]:
        encode = load_tokenizer(path).encode
        prompts = [encode(prompt) for prompt in PROMPTS]
        self._bf16, self._fp32 = MlxAlone(path, mx.bfloat16), MlxAlone(path, mx.float32)
        self._caches = [
            [model.prefill(prompt) for prompt in prompts] for model in (self._bf16, self._fp32)
        ]
        return prompts


def second_token(vllm: Vllm, prompt: str, **fields: Any) -> tuple[list[int], Top]:
    """Prompt and first token, and what may come next, through vLLM's API."""
    answer = vllm.complete(
        prompt, 2, logprobs=TOP, return_tokens_as_token_ids=True, ignore_eos=True, **fields
    )["choices"][0]
    top = answer["logprobs"]["top_logprobs"][1]
    return (
        [*answer["prompt_token_ids"], answer["token_ids"][0]],
        {int(name.removeprefix("token_id:")): value for name, value in top.items()},
    )


@pytest.mark.timeout(1500)
def test_first_logits_after_the_hand_off_in_bf16(smollm2: Path, tmp_path: Path) -> None:
    yardsticks = Yardsticks(smollm2)
    with pair(smollm2, tmp_path, args=BF16, receiver_args=BF16) as (vllm, receiver):
        before = receiver.metric("mlx_receiver_decoded_tokens_total")
        handed_off = [second_token(vllm, prompt) for prompt in PROMPTS]
        middle = receiver.metric("mlx_receiver_decoded_tokens_total")
        local = [second_token(vllm, prompt, **LOCAL) for prompt in PROMPTS]
        assert middle - before == len(PROMPTS)
        assert receiver.metric("mlx_receiver_decoded_tokens_total") == middle

    rows: dict[str, list[Difference]] = {}
    alone_and_exact = yardsticks.tops([tokens for tokens, _ in handed_off])
    for (tokens, ours), (same_tokens, theirs), (alone, exact) in zip(
        handed_off, local, alone_and_exact, strict=True
    ):
        assert tokens == same_tokens
        for name, (a, b) in {
            "hand-off, MLX alone": (alone, ours),
            "vLLM alone, MLX alone": (alone, theirs),
            "hand-off, vLLM alone": (theirs, ours),
            "hand-off, MLX in fp32": (exact, ours),
            "MLX alone, MLX in fp32": (exact, alone),
            "vLLM alone, MLX in fp32": (exact, theirs),
        }.items():
            rows.setdefault(name, []).append(Difference.of(a, b))
    for name, found in rows.items():
        kl, largest = [d.kl for d in found], [d.largest for d in found]
        print(
            f"{name:24} KL {fmean(kl):.2e} (at most {max(kl):.2e}), "
            f"|difference| {fmean(largest):.2f} on average, at most {max(largest):.2f}"
        )

    # Measured on an AVX2 CPU, means of the 20 prompts: KL 2.1e-3 for the hand-off and 1.7e-3 for
    # vLLM alone; largest differences 0.21 and 0.20. Single prompts are up to 8 times closer or
    # farther than the yardstick, so means are bounded. The heads of one late layer in a wrong order
    # give 1.5e-2 and 0.8. Smaller faults are for the comparisons of tokens in fp32 to find.
    ours, yardstick = rows["hand-off, MLX alone"], rows["vLLM alone, MLX alone"]
    assert fmean(d.kl for d in ours) <= 1.5 * fmean(d.kl for d in yardstick)
    assert fmean(d.largest for d in ours) <= 1.5 * fmean(d.largest for d in yardstick)
