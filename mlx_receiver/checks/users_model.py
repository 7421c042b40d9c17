"""The model that is to be served: does it fit, and does it write the same on both processors?"""

from __future__ import annotations

from typing import Final

from mlx_receiver.checks.decoding import check_tokens
from mlx_receiver.checks.finding import Finding, unchecked
from mlx_receiver.decode import weights
from mlx_receiver.decode.model import ModelSource, load_model

#: Prompt and output of the comparison: the CPU is slow.
_PROMPT_TOKENS: Final = 16
_TOKENS: Final = 4


def check_fit(source: ModelSource, memory: weights.Memory | None = None) -> Finding:
    """Its weights leave room for KV; how much, in tokens."""
    memory = memory or weights.memory()
    per_token = source.layout.bytes_per_token
    kv = f"{per_token / 1024:g} KiB of KV a token in 16 bits"
    needed = weights.weights_nbytes(source.path)
    if needed is None:
        return unchecked("model", f"the size of the weights is known once they are here; {kv}")
    if memory is None:
        return unchecked("model", f"weights of {needed / 2**30:.1f} GiB; {kv}; the GPU's memory")
    why = weights.refusal(source.name, needed, source.session_bytes(), memory)
    if why is not None:
        seen, _, remedy = why.partition(". ")
        return Finding("model", "wrong", seen, remedy)
    budget = int((memory.limit - needed) * weights.KV_SHARE)
    return Finding(
        "model", "fine",
        f"weights of {needed / 2**30:.2f} GiB of the {memory.limit / 2**30:.1f} GiB that may be "
        f"used; {kv}: room for {budget // per_token:,} tokens, or "
        f"{budget // per_token // 8192:,} sessions of 8,192",
    )  # fmt: skip


def check_users_tokens(source: ModelSource) -> Finding:
    """The model itself, a few tokens, if its weights are here."""
    name = "model's tokens"
    if not any(source.path.glob("model*.safetensors")):
        return unchecked(name, f"its weights are not here yet: hf download {source.name}")
    model = load_model(source).model
    vocabulary = source.signature.vocab_size
    prompt = [1 + index * 97 % (vocabulary - 1) for index in range(_PROMPT_TOKENS)]
    return check_tokens(name, model, prompt, _TOKENS)
