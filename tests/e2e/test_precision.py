"""In bf16 a hand-off is no farther from MLX alone than vLLM alone is.

vLLM prefills and samples the first token; the log-probabilities of the second token are the first
that the receiver computes. They are compared with MLX's own prefill of the same tokens, and with
the same request decoded by vLLM. The two engines round bf16 in different places, so they differ
without any hand-off: that difference is the yardstick.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_map
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from tests.servers import Vllm, pair

pytestmark = [pytest.mark.server, pytest.mark.real_model]

BF16 = ("--dtype", "bfloat16")
TOP = 20
#: Any plugin's argument keeps a request local, see `vllm_mac_decode.policy`.
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

    def top(self, prompt: list[int]) -> Top:
        cache: list[Any] = make_prompt_cache(self.model)
        self.model.model(mx.array([prompt[:-1]]), cache=cache)
        mx.eval([layer.state for layer in cache])
        logits = self.model(mx.array([prompt[-1:]]), cache=cache)[0, -1].astype(mx.float32)
        logprobs = logits - mx.logsumexp(logits)
        likeliest = mx.argsort(-logprobs)[:TOP].tolist()
        return {token: logprobs[token].item() for token in likeliest}


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
    with pair(smollm2, tmp_path, args=BF16, receiver_args=BF16) as (vllm, receiver):
        before = receiver.metric("mlx_receiver_decoded_tokens_total")
        handed_off = [second_token(vllm, prompt) for prompt in PROMPTS]
        middle = receiver.metric("mlx_receiver_decoded_tokens_total")
        local = [second_token(vllm, prompt, **LOCAL) for prompt in PROMPTS]
        assert middle - before == len(PROMPTS)
        assert receiver.metric("mlx_receiver_decoded_tokens_total") == middle

    bf16, fp32 = MlxAlone(smollm2, mx.bfloat16), MlxAlone(smollm2, mx.float32)
    rows: dict[str, list[Difference]] = {}
    for (tokens, ours), (same_tokens, theirs) in zip(handed_off, local, strict=True):
        assert tokens == same_tokens
        alone, exact = bf16.top(tokens), fp32.top(tokens)
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
