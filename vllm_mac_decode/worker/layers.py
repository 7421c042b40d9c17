"""A worker's part of the model: which layers and KV heads it holds, and how to read them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from mlx_receiver.wire.layout import FULL, WINDOW
from vllm_mac_decode.worker.paged_cache import ExportedLayer
from vllm_mac_decode.worker.paged_layout import LayoutError, PagedLayout, layer_update, probe

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = init_logger("vllm.mac_decode.layers")


def exported_layers(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, caches: dict[str, torch.Tensor]
) -> dict[str, ExportedLayer]:
    """This worker's layers by vLLM's layer name; empty if another worker exports the same heads.

    Raises LayoutError when some layer cannot be exported.
    """
    model_heads = vllm_config.model_config.get_total_num_kv_heads()
    rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    replicas = max(1, size // model_heads)
    groups = {
        name: (index, _spec(group.kv_cache_spec, name))
        for index, group in enumerate(kv_cache_config.kv_cache_groups)
        for name in group.layer_names
    }
    unknown = sorted({kind for _, spec in groups.values() if (kind := _unknown(spec))})
    if unknown:
        raise LayoutError(f"it has layers of the kinds {', '.join(unknown)}")
    if rank % replicas:
        return {}

    known: dict[Any, PagedLayout] = {}
    layers = {}
    for name, cache in caches.items():
        attention = vllm_config.compilation_config.static_forward_context[name]
        if getattr(attention, "kv_sharing_target_layer_name", None) is not None:
            continue  # it reads another layer's, which travels once
        group, spec = groups[name]
        heads = attention.num_kv_heads
        key = (type(attention.impl), cache.shape, cache.stride(), cache.dtype, heads)
        if key not in known:
            try:
                known[key] = probe(
                    cache,
                    kv_cache_config.num_blocks,
                    int(spec.block_size),
                    heads,
                    attention.head_size,
                    layer_update(attention),
                )
            except LayoutError as error:
                raise LayoutError(f"layer {name}: {error}") from None
            logger.debug("layout of %s: %s", name, known[key])
        window = getattr(spec, "sliding_window", None)
        layers[name] = ExportedLayer(
            extract_layer_index(name),
            cache,
            known[key],
            rank // replicas * heads,
            FULL if window is None else WINDOW,
            int(spec.block_size),
            group,
            window,
        )
    return layers


def _spec(spec: Any, name: str) -> Any:
    """The layer's own, where those of a group differ (``UniformTypeKVCacheSpecs``)."""
    specs = getattr(spec, "kv_cache_specs", None)
    return specs[name] if specs is not None else spec


def _unknown(spec: Any) -> str:
    """What kind of cache it is if it is none that can be exported. A subclass may keep anything."""
    plain = type(spec) in (FullAttentionSpec, SlidingWindowSpec)
    if not plain or getattr(spec, "attention_chunk_size", None) is not None:
        return type(spec).__name__.removesuffix("Spec")
    return ""


def updates_before_hook(vllm_config: VllmConfig, caches: dict[str, torch.Tensor]) -> bool:
    """Whether every layer's K and V are in the cache before ``wait_for_layer_load`` is called.

    vLLM calls that hook around the attention operator; backends with
    ``forward_includes_kv_cache_update = False`` update the cache in an operator before it.
    """
    context = vllm_config.compilation_config.static_forward_context
    backends = {getattr(context[name], "attn_backend", None) for name in caches}
    return all(getattr(b, "forward_includes_kv_cache_update", True) is False for b in backends)
