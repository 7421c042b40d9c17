"""Whether two engines compute the same cache: one prompt's, part by part, and the token after it.

Equal layouts do not prove equal numbers: the two engines may rotate keys by other conventions,
scale them differently, or have loaded another fine-tune. What is compared is what vLLM exported
against what MLX's own prefill of the same tokens gives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import mlx.core as mx

from mlx_receiver.decode.jobs import Verdict
from mlx_receiver.decode.model import LoadedModel


@dataclass(frozen=True, slots=True)
class Limits:
    """How far apart two caches may be.

    ``first``: a part of the first layer, |theirs - own| / |own|. What rounding does there, every
    layer adds to: a quarter of it is granted for each, up to ``growth`` times as much. A state of
    the whole text gathers the rounding of all its tokens: twice as much is granted. ``nats``: the
    next token's distribution (Kullback-Leibler divergence).
    """

    first: float
    growth: float
    nats: float

    def of(self, one: Apart) -> float:
        """How far that part may be."""
        granted = self.first * min(1 + one.layer / 4, self.growth)
        return granted if one.by_token else 2 * granted


#: By the fewest bits that a weight has on either side, or a number of the cache that came.
#: Measured: ``bench/proof.py``, and its table in docs/models.md.
LIMITS: Final = {
    32: Limits(5e-3, 4, 1e-3),
    16: Limits(0.02, 8, 0.05),
    8: Limits(0.12, 5, 1.0),
    4: Limits(0.35, 4, 3.0),
}


#: Of the tokens of a model with experts, see ``differences``.
_STRAYS: Final = 0.25


@dataclass(frozen=True, slots=True)
class Apart:
    """How far one part is from the receiver's own."""

    layer: int
    part: str
    error: float
    cosine: float
    by_token: bool = True

    @property
    def text(self) -> str:
        """For people."""
        return f"layer {self.layer}, {self.part}: {_percent(self.error)} apart"


def bits(weights: str) -> int:
    """The fewest bits that ``weights`` have, a dtype's name or a quantisation's: 32, 16, 8 or 4."""
    name = weights.lower()
    if name in ("float32", "fp32"):
        return 32
    if name in ("bfloat16", "float16", "half"):
        return 16
    if any(known in name for known in ("fp4", "int4", "w4", "4bit", "awq", "gptq")):
        return 4
    return 8 if "8" in name else 4


def own_weights(config: dict[str, Any], dtype: str) -> str:
    """What an MLX model's weights are kept in: by its configuration, else as it computes."""
    quantization = config.get("quantization")
    if isinstance(quantization, dict) and isinstance(quantization.get("bits"), int):
        return f"{quantization['bits']}bit"
    return str(config.get("torch_dtype") or config.get("dtype") or dtype)


def compare(
    loaded: LoadedModel,
    tokens: Sequence[int],
    caches: list[Any],
    following: int,
    weights: list[str],
    kv_dtype: str,
) -> Verdict:
    """Compare the ``caches`` that were built for ``tokens`` with the model's own, and what both
    say about the token that comes after ``following``. ``weights`` are both sides', ``kv_dtype`` is
    that of the numbers that came."""
    model = loaded.model
    own = loaded.cache.empty()
    model(mx.array([list(tokens)]), cache=own)  # its logits are never computed
    mx.eval([cache.state for cache in own])
    limits = LIMITS[min(map(bits, [*weights, kv_dtype]))]
    apart = differences(loaded, len(tokens), caches, own)
    said = f"{' and '.join(dict.fromkeys(weights))} weights"
    if bits(kv_dtype) < min(map(bits, weights)):
        said += f" and KV in {kv_dtype}"
    wrong = [one for one in apart if not one.error <= limits.of(one)]
    if wrong:
        found = wrong[0]
        return Verdict(
            False,
            f"{found.text} (cosine {found.cosine:.3f}; {_percent(limits.of(found))} is "
            f"allowed for {said}), the first of the {len(wrong)} of {len(apart)} parts "
            "that differ: the two engines do not compute the same cache. Serve the same model and "
            "revision on both machines",
        )
    nats = _divergence(model, following, caches, own)
    worst = max(apart, key=lambda one: one.error)
    text = (
        f"{len(loaded.cache.layout.layers)} layers compared, at most {_percent(worst.error)} apart "
        f"(layer {worst.layer}, {worst.part}; {_percent(limits.of(worst))} is allowed for "
        f"{said}), the next token's probabilities {nats:.2g} nats"
    )
    if not nats <= limits.nats:
        return Verdict(False, f"{text}, of which {limits.nats:g} are allowed")
    return Verdict(True, text)


def differences(
    loaded: LoadedModel, tokens: int, caches: Sequence[Any], own: Sequence[Any]
) -> list[Apart]:
    """Every part of every layer, in order. Of a model with experts the ``_STRAYS`` of a part's
    tokens that are furthest apart do not count: where two experts are as good for a token, rounding
    decides, and sends that token, but no other, through another matrix on either side. No expert
    comes before the first layer: of that all tokens count."""
    cache = loaded.cache
    pairs = [
        (index, part, theirs.astype(mx.float32), mine.astype(mx.float32))
        for index, layer in enumerate(cache.layout.layers)
        for part, theirs, mine in zip(
            layer.parts,
            cache.parts(index, caches[index], tokens),
            cache.parts(index, own[index], tokens),
            strict=True,
        )
    ]
    sums = mx.stack(
        [_sums(a, b, loaded.experts and index > 0 and part.by_token) for index, part, a, b in pairs]
    ).tolist()
    return [
        Apart(index, part.name, _ratio(squares, mine), _cosine(both, theirs, mine), part.by_token)
        for (index, part, *_), (squares, theirs, mine, both) in zip(pairs, sums, strict=True)
    ]


def _sums(theirs: mx.array, own: mx.array, strays: bool) -> mx.array:
    """Of two ``[..., tokens, width]`` the sums |theirs - own|², |theirs|², |own|² and their
    product; without the ``strays`` if there are any."""
    products = mx.stack([(theirs - own).square(), theirs.square(), own.square(), theirs * own])
    if not strays:
        return products.flatten(1).sum(1)
    tokens = products.sum(-1).reshape(4, -1, products.shape[-2]).sum(1)
    kept = tokens.shape[1] - int(_STRAYS * tokens.shape[1])
    apart = mx.where(tokens[2] > 0, tokens[0] / tokens[2], mx.where(tokens[0] > 0, mx.inf, 0.0))
    found = tokens[:, mx.argsort(apart)[:kept]].sum(1)
    return mx.where(mx.isfinite(tokens).all(), found, mx.nan)  # what is no number always counts


def _divergence(model: Any, token: int, caches: list[Any], own: list[Any]) -> float:
    """Nats from the own distribution after ``token`` to the one with the others' cache."""
    logs = [
        (logits - mx.logsumexp(logits))
        for cache in (own, caches)
        for logits in [model(mx.array([[token]]), cache=cache)[0, -1].astype(mx.float32)]
    ]
    mine, theirs = logs
    likely = mine > -1e4  # a token that cannot come says nothing
    found = mx.where(likely, mx.exp(mine) * (mine - theirs), 0.0).sum()
    nats = float(found.item())
    return 0.0 if nats < 0 else nats  # rounding; one that is no number stays none


def _ratio(squares: float, own: float) -> float:
    if own == 0:
        return 0.0 if squares == 0 else math.inf
    return math.sqrt(squares / own)


def _cosine(both: float, theirs: float, own: float) -> float:
    product = math.sqrt(theirs * own)
    return both / product if product else float(theirs == own)


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.2g} %" if ratio < 0.1 else f"{100 * ratio:.0f} %"
