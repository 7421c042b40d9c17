"""A model's cache from its ``config.json``, of every kind that is handed off.

For sizes of models that nobody has loaded here. What is handed off follows from what both engines
allocate, with which ``tests/test_shapes.py`` and ``tests/e2e/test_families.py`` compare this. The
bytes of a prompt are ``CacheLayout.nbytes``'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mlx_receiver.wire.layout import (
    FULL,
    ITEMSIZE,
    KEYS,
    NOTHING,
    RECURRENT,
    VALUES,
    CacheLayout,
    Held,
    LayerLayout,
    Part,
    beside,
    chunked,
    need,
    text_config,
    windowed,
)

#: What configurations call a layer that keeps a state.
_RECURRENT = ("linear_attention", "mamba", "conv", "M")
_NOTHING = ("mlp", "moe", "-", "E")


def wire_dtypes(config: Mapping[str, Any], dtype: str) -> tuple[str, str]:
    """Of K, V and convolutions, and of the larger recurrent states, where vLLM runs the model in
    ``dtype``: Nemotron-H and Qwen3.5 keep those in fp32."""
    c, kind = text_config(config), str(config.get("model_type"))
    if kind == "nemotron_h":
        return dtype, str(c.get("mamba_ssm_cache_dtype") or "float32")
    return dtype, str((kind.startswith("qwen3_5") and c.get("mamba_ssm_dtype")) or dtype)


def layout_of(config: Mapping[str, Any], dtype: str, state_dtype: str) -> CacheLayout:
    """The layout that vLLM allocates. Raises ValueError naming what the configuration lacks."""
    c = text_config(config)
    kinds = _kinds(c)
    # The last ones read an earlier layer's.
    kinds = kinds[: len(kinds) - int(c.get("num_kv_shared_layers") or 0)]
    layers = []
    for kind in kinds:
        if kind in _NOTHING:
            continue
        if kind in _RECURRENT:
            layers.append(_states(c, dtype, state_dtype))
        elif kind == "chunked_attention":
            layers.append(chunked(_attention(c, dtype, False), need(c, "attention_chunk_size")))
        elif kind == "sliding_attention":
            window = need(c, "sliding_window") + (c.get("model_type") == "cohere2")
            layers.append(windowed(_attention(c, dtype, False), window))
        else:
            layers.append(_attention(c, dtype, True))
    if c.get("model_type") == "falcon_h1":
        states = _states(c, dtype, state_dtype)
        layers = [beside([states, layer]) for layer in layers]
    return CacheLayout(layers)


def _kinds(c: Mapping[str, Any]) -> list[str]:
    for key in ("layer_types", "layers_block_type", "hybrid_override_pattern"):
        if c.get(key):
            return list(c[key])
    count, every = need(c, "num_hidden_layers"), c.get("full_attention_interval")
    if every:
        return ["linear_attention" if (i + 1) % every else "full_attention" for i in range(count)]
    return ["full_attention"] * count


def _attention(c: Mapping[str, Any], dtype: str, whole: bool) -> LayerLayout:
    if c.get("kv_lora_rank"):
        return _kv(1, need(c, "kv_lora_rank"), need(c, "qk_rope_head_dim"), dtype)
    heads = need(c, "num_attention_heads")
    kv_heads = c.get("num_key_value_heads") or heads
    width = c.get("head_dim") or need(c, "hidden_size") // heads
    if whole and c.get("global_head_dim"):  # Gemma 4
        width = c["global_head_dim"]
        if c.get("attention_k_eq_v"):
            kv_heads = c.get("num_global_key_value_heads") or kv_heads
    return _kv(kv_heads, width, width, dtype)


def _kv(heads: int, keys: int, values: int, dtype: str) -> LayerLayout:
    parts = [Part(KEYS, heads, keys, dtype), Part(VALUES, heads, values, dtype)]  # type: ignore[arg-type]
    return LayerLayout(FULL, parts)


def _states(c: Mapping[str, Any], dtype: str, state_dtype: str) -> LayerLayout:
    """The last inputs of a convolution, and what the text so far comes to, if it is kept."""
    if "conv_L_cache" in c:  # LFM2's short convolutions
        return _recurrent(need(c, "conv_L_cache") - 1, need(c, "hidden_size"), dtype, [], "")
    if "linear_num_value_heads" in c:  # a gated delta net
        heads, width = need(c, "linear_num_value_heads"), need(c, "linear_value_head_dim")
        depth = need(c, "linear_key_head_dim")
        mixed = heads * width + 2 * need(c, "linear_num_key_heads") * depth
        window = need(c, "linear_conv_kernel_dim")
    else:  # Mamba 2
        nemotron = "mamba_num_heads" in c
        heads = need(c, "mamba_num_heads" if nemotron else "mamba_n_heads")
        width = need(c, "mamba_head_dim" if nemotron else "mamba_d_head")
        depth = need(c, "ssm_state_size" if nemotron else "mamba_d_state")
        groups = need(c, "n_groups" if nemotron else "mamba_n_groups")
        mixed = heads * width + 2 * groups * depth
        window = need(c, "conv_kernel" if nemotron else "mamba_d_conv")
    return _recurrent(window - 1, mixed, dtype, [heads, width, depth], state_dtype)


def _recurrent(
    inputs: int, mixed: int, dtype: str, state: list[int], state_dtype: str
) -> LayerLayout:
    parts = [Part("state0", inputs, 1, dtype, by_token=False, rows=mixed)]  # type: ignore[arg-type]
    if state:
        heads, width, depth = state
        dims = [width, depth]
        parts.append(
            Part("state1", heads, width * depth, state_dtype, by_token=False, dims=dims)  # type: ignore[arg-type]
        )
    return LayerLayout(RECURRENT, parts)


def token_bytes(layout: CacheLayout) -> int:
    """Bytes that each token of a long prompt adds."""
    return sum(
        part.row * ITEMSIZE[part.dtype]
        for layer in layout.layers
        for part in layer.parts
        if part.by_token and not part.bounded
    )


def fixed_bytes(layout: CacheLayout) -> int:
    """Bytes of a long prompt that do not grow with it: states, windows, which are full, and chunks,
    which are so at the most."""
    return sum(
        (part.window or part.chunk or part.rows) * part.row * ITEMSIZE[part.dtype]
        for layer in layout.layers
        for part in layer.parts
        if part.bounded or not part.by_token
    )


def kv_bytes(layout: CacheLayout) -> Callable[[int, int], float]:
    """For a prompt's tokens ``[start, end)``, of which those before are held: bytes that travel, as
    ``layout.nbytes`` counts them. Parts that are alike are counted once, so that a decision takes
    microseconds."""
    alike: dict[tuple[object, ...], tuple[Part, int]] = {}
    for layer in layout.layers:
        for part in layer.parts:
            key = part.by_token, part.window, part.chunk, part.rows
            _, nbytes = alike.get(key, (part, 0))
            alike[key] = part, nbytes + part.row * ITEMSIZE[part.dtype]
    groups = tuple(alike.values())

    def counted(start: int, end: int) -> float:
        held = Held(start, bounded=True) if start > 0 else NOTHING
        return float(sum(part.travels(end, held) * nbytes for part, nbytes in groups))

    return counted
