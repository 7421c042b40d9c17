"""The built-in kinds of cache on vLLM's side: attention's K and V, and recurrent layers' states."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from mlx_receiver.wire.layout import CHUNK, FULL, RECURRENT, WINDOW
from vllm_mac_decode.worker.numbers import numbers_of
from vllm_mac_decode.worker.paged_cache import AllocatedLayer, PagedAdapter, Readable
from vllm_mac_decode.worker.paged_layout import PagedLayout, latent_update, layer_update, probe
from vllm_mac_decode.worker.paged_states import PagedStates, states_of
from vllm_mac_decode.worker.state_shards import shard_of

_ATTENTION = (
    FullAttentionSpec, SlidingWindowSpec, ChunkedLocalAttentionSpec, MLAAttentionSpec,
)  # fmt: skip

logger = init_logger("vllm.mac_decode.kinds")


def builtin_adapters() -> list[PagedAdapter]:
    """Those that come with this package."""
    return [AttentionKV(), RecurrentStates()]


class AttentionKV:
    """See ``PagedAdapter``: K and V of all tokens, of a window's or a chunk's, or a latent and a
    rotated key (MLA), wherever in a block the backend puts them (``paged_layout.probe``)."""

    def __init__(self) -> None:
        """Layers of one form are probed once."""
        self._known: dict[Any, PagedLayout] = {}

    def readable(self, layer: AllocatedLayer) -> Readable | None:
        spec, attention, cache = layer.spec, layer.module, layer.cache
        # A subclass may keep anything.
        if type(spec) not in _ATTENTION:
            return None
        latent = isinstance(spec, MLAAttentionSpec)
        heads = 1 if latent else attention.num_kv_heads
        calculated = getattr(layer.config.cache_config, "calculate_kv_scales", False)
        numbers = numbers_of(attention, cache, layer.config.model_config.dtype, calculated)
        if latent:  # both are written with the scale of keys
            numbers = replace(numbers, scales=(numbers.scales[0],) * 2)
        key = (type(attention.impl), cache.shape, cache.stride(), numbers.stored, heads)
        if key not in self._known:
            self._known[key] = probe(
                cache,
                layer.blocks,
                int(spec.block_size),
                heads,
                _widths(attention, spec),
                latent_update(attention) if latent else layer_update(attention),
                numbers,
            )
            logger.debug("layout of %s: %s", layer.name, self._known[key])
        window = getattr(spec, "sliding_window", None)
        chunk = getattr(spec, "attention_chunk_size", None)
        kind = CHUNK if chunk is not None else FULL if window is None else WINDOW
        layout = replace(self._known[key], numbers=numbers)  # a scale is each layer's own
        return Readable(kind, layout, cache, window, chunk, replicated=latent)


class RecurrentStates:
    """See ``PagedAdapter``: what a recurrent layer has made of the whole text."""

    def readable(self, layer: AllocatedLayer) -> Readable | None:
        if type(layer.spec) is not MambaSpec:
            return None
        rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        mamba_type = getattr(layer.spec, "mamba_type", None)
        states = states_of(layer.module, mamba_type)
        shard = shard_of(layer.module, states, mamba_type, rank, size)
        paged = PagedStates.of(states, int(layer.spec.block_size), shard.runs)
        return Readable(RECURRENT, paged, states, head_start=shard.head_start)


def _widths(attention: Any, spec: Any) -> tuple[int, int]:
    """Of a head's K and V, or of the latent and the rotated key."""
    if isinstance(spec, MLAAttentionSpec):
        return attention.kv_lora_rank, attention.qk_rope_head_dim
    keys = int(attention.head_size)
    return keys, int(getattr(attention, "head_size_v", None) or keys)
