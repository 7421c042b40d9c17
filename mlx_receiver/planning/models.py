"""What a model asks of a machine, from its ``config.json``: operations, and bytes of memory read.

Counted are the matrices: a token passes through each once (of experts, through those that it is
routed to), which takes two operations for each number in them; a decode step reads each once.
Norms, biases and rotations are left out, below one part in a hundred, as is the embedding, of which
one row is read. Of prefilling, the output matrix is needed for the last token only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from mlx_receiver.planning.published import PUBLISHED
from mlx_receiver.planning.shapes import layout_of, token_bytes, wire_dtypes
from mlx_receiver.wire.layout import RECURRENT, WINDOW, CacheLayout, need, text_config

#: Bits of a number of the weights, for each way to quantise them that has one: 4-bit floats in
#: groups of 32 share an exponent of 8 bits.
_BITS: Final = {"fp8": 8.0, "mxfp4": 4.25, "compressed-tensors": None}
_PLAIN_BITS: Final = 16.0

#: Of any figure: beyond it a configuration is not one.
_MOST: Final = 1e18

#: Keys of layers whose computation is not counted here.
_UNCOUNTED: Final = {
    "mamba_num_heads": "Mamba layers",
    "mamba_n_heads": "Mamba layers",
    "mamba_d_state": "Mamba layers",
    "conv_L_cache": "short convolutions",
    "interleave_moe_layer_step": "experts in some layers only",
    "hidden_size_per_layer_input": "embeddings of each layer",
    "global_head_dim": "layers of two widths",
}


@dataclass(frozen=True, slots=True)
class Weights:
    """Numbers in the matrices of all layers, and of the output matrix."""

    #: That every token passes through.
    dense: float
    #: Of the experts: that one token is routed to, and all.
    routed: float
    experts: float
    head: float


@dataclass(frozen=True, slots=True)
class Model:
    """One model, as one machine has it. ``pair`` is operations for each token and one before it,
    ``token`` those of a token besides its matrices; ``moved`` the numbers that a token's other
    steps read and write in prefilling (norms, rotations, activations); ``routers`` the layers that
    have experts."""

    name: str
    layout: CacheLayout
    hidden: int
    weights: Weights
    pair: float
    token: float
    moved: float
    routers: int
    dense_bits: float
    expert_bits: float
    tied: bool = False  # the output matrix is the embedding

    @property
    def layers(self) -> int:
        """That keep something in the cache, which is sent layer by layer."""
        return len(self.layout.layers)

    @property
    def nbytes(self) -> float:
        """Of all matrices, the embedding included."""
        numbers = self.weights.dense + (2 - self.tied) * self.weights.head
        return (numbers * self.dense_bits + self.weights.experts * self.expert_bits) / 8

    @property
    def step_bytes(self) -> float:
        """That each decode step reads, whatever its batch."""
        return (self.weights.dense + self.weights.head) * self.dense_bits / 8

    @property
    def row_bytes(self) -> float:
        """Of experts, that each text in the batch adds to that."""
        return self.weights.routed * self.expert_bits / 8

    @property
    def context_bytes(self) -> float:
        """Of the cache, that each of a text's tokens adds to that."""
        return float(token_bytes(self.layout))


def find(name: str, bits: float | None = None) -> Model:
    """The model of that published name, or of a ``config.json`` at that path or in that folder.

    ``bits`` is what its weights have for each number, if another than the configuration says.
    Raises ValueError saying what is wrong and what to do.
    """
    return from_config(*_configuration(name), bits)


def cache(name: str) -> tuple[str, CacheLayout]:
    """That model's name and its cache alone, which is known of more models than ``find`` counts the
    operations of. Raises ValueError saying what is wrong and what to do."""
    named, config = _configuration(name)
    try:
        layout = layout_of(config, *wire_dtypes(config, "bfloat16"))
    except (ValueError, TypeError, OverflowError, msgspec.ValidationError) as error:
        raise ValueError(f"{named}: {error}") from None
    if not layout.layers:
        raise ValueError(f"{named}: none of its layers keeps anything")
    return named, layout


def _configuration(name: str) -> tuple[str, dict[str, Any]]:
    """A model's own name, and what its ``config.json`` says. What is there goes before a published
    one of the same name."""
    try:
        path = Path(name).expanduser()
        path = path / "config.json" if path.is_dir() else path
        there = path.is_file()
    except (OSError, RuntimeError, ValueError):  # no path at all: too long, or the home of nobody
        there = False
    if not there:
        for one in PUBLISHED:
            if one.name.lower() == name.rsplit("/", 1)[-1].lower():
                return one.name, one.config
        known = ", ".join(one.name for one in PUBLISHED)
        raise ValueError(f"no model {name}: give the path of a config.json, or one of {known}")
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: no configuration of a model")
    return path.resolve().parent.name, config


def from_config(name: str, config: Mapping[str, Any], bits: float | None = None) -> Model:
    """The model of a configuration. Raises ValueError naming what it lacks."""
    try:
        found = _counted(name, config, bits)
        figures = (*astuple(found.weights), found.pair, found.token, found.moved, found.nbytes)
        if not all(0 <= figure < _MOST for figure in (*figures, found.context_bytes)):
            raise ValueError("no model has such numbers")
        return found
    except (ValueError, TypeError, OverflowError, msgspec.ValidationError) as error:
        raise ValueError(f"{name}: {error}") from None


def _counted(name: str, config: Mapping[str, Any], bits: float | None) -> Model:
    c = text_config(config)
    for key, what in _UNCOUNTED.items():
        if c.get(key):
            raise ValueError(
                f"it has {what} ({key}), whose computation is not counted here: measure it instead"
            )
    layout = layout_of(config, *wire_dtypes(config, "bfloat16"))
    if not layout.layers:
        raise ValueError("none of its layers keeps anything")
    lacking = [key for key in ("hidden_size", "vocab_size") if not isinstance(c.get(key), int)]
    if lacking:
        raise ValueError(
            f"its configuration lacks {' and '.join(lacking)}: give the path of its config.json"
        )
    hidden, vocabulary = need(c, "hidden_size"), need(c, "vocab_size")
    count = need(c, "num_hidden_layers")
    recurrent = sum(layer.kind == RECURRENT for layer in layout.layers)
    windows = [layer.parts[0].window or 0 for layer in layout.layers if layer.kind == WINDOW]
    attention, width, pair = _attention(c, hidden)
    full = count - recurrent - len(windows)
    mixed, states = _delta_net(c, hidden) if recurrent else (0.0, 0.0)
    dense, routed, experts, inner = _feed_forward(c, hidden, count)
    weights = Weights(
        dense + (count - recurrent) * attention + recurrent * mixed,
        routed,
        experts,
        float(hidden * vocabulary),
    )
    # Two norms that add, each reading and writing two vectors; queries and keys rotated in place;
    # gate and up read, their product written.
    moved = count * 8 * hidden + 3 * inner + (count - recurrent) * 2 * width
    dense_bits, expert_bits = _bits(config, bits)
    return Model(
        name,
        layout,
        hidden,
        weights,
        pair * full,
        pair * sum(windows) + recurrent * states,
        moved,
        count - int(c.get("first_k_dense_replace") or 0) if experts else 0,
        dense_bits,
        expert_bits,
        bool(config.get("tie_word_embeddings", c.get("tie_word_embeddings"))),
    )


def _attention(c: Mapping[str, Any], hidden: int) -> tuple[float, float, float]:
    """Of one layer: numbers in its matrices, numbers of a token's queries, keys and values, and
    operations for each pair of tokens: a product of queries with keys, one with values."""
    heads = need(c, "num_attention_heads")
    if c.get("kv_lora_rank"):
        latent, rotated = need(c, "kv_lora_rank"), need(c, "qk_rope_head_dim")
        keys, values = need(c, "qk_nope_head_dim") + rotated, need(c, "v_head_dim")
        rank = c.get("q_lora_rank")
        queries = heads * keys * (rank or hidden) + (hidden * rank if rank else 0)
        both = hidden * (latent + rotated) + latent * heads * (keys - rotated + values)
        matrices = queries + both + heads * values * hidden
        return float(matrices), float(heads * (2 * keys + values)), 2.0 * heads * (keys + values)
    width = c.get("head_dim") or hidden // heads
    kv_heads = c.get("num_key_value_heads") or heads
    gate = 1 + bool(c.get("attn_output_gate"))
    matrices = hidden * width * (heads * (1 + gate) + 2 * kv_heads)
    return float(matrices), float(width * (heads + 2 * kv_heads)), 4.0 * heads * width


def _delta_net(c: Mapping[str, Any], hidden: int) -> tuple[float, float]:
    """Of one layer: numbers in its matrices, operations of a token on the state, which is read,
    corrected and read again."""
    heads, depth = need(c, "linear_num_value_heads"), need(c, "linear_key_head_dim")
    values = heads * need(c, "linear_value_head_dim")
    keys = need(c, "linear_num_key_heads") * depth
    matrices = hidden * (2 * keys + 2 * values + 2 * heads) + values * hidden
    return float(matrices), 6.0 * values * depth


def _feed_forward(
    c: Mapping[str, Any], hidden: int, count: int
) -> tuple[float, float, float, float]:
    """Of all layers: numbers that every token passes through, that one is routed to, of all
    experts; and the inner width that a token has in all of them."""
    experts = c.get("n_routed_experts") or c.get("num_local_experts") or c.get("num_experts")
    if not experts:
        inner = need(c, "intermediate_size")
        return 3.0 * hidden * inner * count, 0.0, 0.0, float(inner * count)
    dense = int(c.get("first_k_dense_replace") or 0)
    used = c.get("num_experts_per_tok") or need(c, "num_experts_per_token")
    inner = c.get("moe_intermediate_size") or need(c, "intermediate_size")
    shared = c.get("shared_expert_intermediate_size") or (c.get("n_shared_experts") or 0) * inner
    every = (count - dense) * hidden * (3 * shared + experts)  # the router's matrix, too
    if dense:
        every += dense * 3 * hidden * need(c, "intermediate_size")
    each = 3.0 * hidden * inner * (count - dense)
    width = (count - dense) * (used * inner + shared)
    return float(every), each * used, each * experts, float(width)


def _bits(config: Mapping[str, Any], bits: float | None) -> tuple[float, float]:
    """Bits of each number, of matrices that every token uses and of experts'."""
    if bits is not None:
        return bits, bits
    made = config.get("quantization")  # by mlx-lm, in groups with a scale and a bias of 16 bits
    if isinstance(made, Mapping) and isinstance(made.get("bits"), int):
        each = made["bits"] + 32 / int(made.get("group_size") or 64)
        return each, each
    given = config.get("quantization_config") or {}
    if not isinstance(given, Mapping):
        raise ValueError(f"its quantization_config is none: {given!r}")
    method = given.get("quant_method")
    if method is None:
        return _PLAIN_BITS, _PLAIN_BITS
    found = _BITS.get(method)
    if found is None:
        raise ValueError(f"its weights are quantised ({method}): say with how many bits")
    return (_PLAIN_BITS if method == "mxfp4" else found), found
