"""A worker's part of the model: which layers and KV heads it holds, and how to read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from mlx_receiver.wire.layout import FULL, RECURRENT, WINDOW
from vllm_mac_decode.worker.paged_cache import ExportedLayer
from vllm_mac_decode.worker.paged_layout import (
    LayoutError,
    PagedLayout,
    latent_update,
    layer_update,
    probe,
)
from vllm_mac_decode.worker.paged_states import PagedStates, states_of
from vllm_mac_decode.worker.state_shards import shard_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = init_logger("vllm.mac_decode.layers")


def exported_layers(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, caches: dict[str, Any]
) -> dict[str, ExportedLayer]:
    """This worker's layers by vLLM's layer name, also those of which another worker sends the same
    heads. Raises LayoutError when some layer cannot be exported."""
    context = vllm_config.compilation_config.static_forward_context
    # Who reads another layer's cache has none of its own: that one travels once.
    own = {
        name: cache
        for name, cache in caches.items()
        if getattr(context[name], "kv_sharing_target_layer_name", None) is None
    }
    places = _places(own, vllm_config)  # first of all: every stage of a pipeline must ask
    rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    groups = {
        name: (index, _spec(group.kv_cache_spec, name))
        for index, group in enumerate(kv_cache_config.kv_cache_groups)
        for name in group.layer_names
    }
    unknown = sorted({kind for _, spec in groups.values() if (kind := _unknown(spec))})
    if unknown:
        raise LayoutError(f"it has layers of the kinds {', '.join(unknown)}")
    # Every rank has the whole latent.
    latents = any(isinstance(spec, MLAAttentionSpec) for _, spec in groups.values())
    heads_of_model = 1 if latents else vllm_config.model_config.get_total_num_kv_heads()
    replicas = max(1, size // max(1, heads_of_model))

    known: dict[Any, PagedLayout] = {}
    layers = {}
    for name, cache in own.items():
        attention = context[name]
        group, spec = groups[name]
        block_size = int(spec.block_size)
        if isinstance(spec, MambaSpec):
            mamba_type = getattr(spec, "mamba_type", None)
            states = states_of(attention, mamba_type)
            shard = shard_of(attention, states, mamba_type, rank, size)
            paged = PagedStates.of(states, block_size, shard.runs)
            layers[name] = ExportedLayer(
                places[name], states, paged, shard.head_start, RECURRENT, block_size, group
            )
            continue
        latent = isinstance(spec, MLAAttentionSpec)
        heads = 1 if latent else attention.num_kv_heads
        key = (type(attention.impl), cache.shape, cache.stride(), cache.dtype, heads)
        if key not in known:
            try:
                known[key] = probe(
                    cache,
                    kv_cache_config.num_blocks,
                    block_size,
                    heads,
                    _widths(attention, spec),
                    latent_update(attention) if latent else layer_update(attention),
                )
            except LayoutError as error:
                raise LayoutError(f"layer {name}: {error}") from None
            logger.debug("layout of %s: %s", name, known[key])
        window = getattr(spec, "sliding_window", None)
        layers[name] = ExportedLayer(
            places[name],
            cache,
            known[key],
            0 if latent else rank // replicas * heads,
            FULL if window is None else WINDOW,
            block_size,
            group,
            window,
            sends=rank % replicas == 0,
        )
    return _side_by_side(layers)


def _places(names: Iterable[str], config: VllmConfig) -> dict[str, int]:
    """Each layer's place among those of the model that have a cache.

    A layer's second cache may go by a number behind all layers' (Falcon-H1).
    """
    total = config.model_config.hf_text_config.num_hidden_layers
    indexes = {name: int(extract_layer_index(name)) % total for name in names}
    found = set(indexes.values())
    if config.parallel_config.pipeline_parallel_size > 1:
        found = _of_all_stages(found)
    order = {index: place for place, index in enumerate(sorted(found))}
    return {name: order[index] for name, index in indexes.items()}


def _of_all_stages(indexes: set[int]) -> set[int]:
    """What each stage of a pipeline found, together. All of them register their caches at once."""
    group = get_pp_group()
    stages: list[set[int]] = [set()] * group.world_size
    torch.distributed.all_gather_object(stages, indexes, group=group.cpu_group)
    return set().union(*stages)


def _side_by_side(layers: dict[str, ExportedLayer]) -> dict[str, ExportedLayer]:
    """Number the parts of layers that have several caches: recurrent ones come first."""
    parts: dict[int, int] = {}
    found = {}
    for name, layer in sorted(layers.items(), key=lambda item: item[1].by_token):
        first = parts.get(layer.index, 0)
        parts[layer.index] = first + len(layer.layout.parts)
        found[name] = replace(layer, first_part=first)
    return {name: found[name] for name in layers}


def _widths(attention: Any, spec: Any) -> tuple[int, int]:
    """Of a head's K and V, or of the latent and the rotated key."""
    if isinstance(spec, MLAAttentionSpec):
        return attention.kv_lora_rank, attention.qk_rope_head_dim
    keys = int(attention.head_size)
    return keys, int(getattr(attention, "head_size_v", None) or keys)


def _spec(spec: Any, name: str) -> Any:
    """The layer's own, where those of a group differ (``UniformTypeKVCacheSpecs``)."""
    specs = getattr(spec, "kv_cache_specs", None)
    return specs[name] if specs is not None else spec


def _unknown(spec: Any) -> str:
    """What kind of cache it is if it is none that can be exported. A subclass may keep anything."""
    known = type(spec) in (FullAttentionSpec, SlidingWindowSpec, MLAAttentionSpec, MambaSpec)
    if not known or getattr(spec, "attention_chunk_size", None) is not None:
        return type(spec).__name__.removesuffix("Spec")
    return ""


def updates_before_hook(vllm_config: VllmConfig, layers: Mapping[str, ExportedLayer]) -> bool:
    """Whether every layer's K and V are in the cache before ``wait_for_layer_load`` is called.

    vLLM calls that hook around the attention operator; backends with
    ``forward_includes_kv_cache_update = False`` update the cache in an operator before it.
    """
    context = vllm_config.compilation_config.static_forward_context
    # No hook surrounds recurrent layers; theirs are written before the next layer's is called.
    names = [name for name, layer in layers.items() if layer.by_token]
    backends = {getattr(context[name], "attn_backend", None) for name in names}
    return all(getattr(b, "forward_includes_kv_cache_update", True) is False for b in backends)
