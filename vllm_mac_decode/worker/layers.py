"""A worker's part of the model: which layers and KV heads it holds, and how to read them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import FullAttentionSpec

from mlx_receiver.wire.layout import FULL
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
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise LayoutError(f"it has {len(groups)} KV cache groups; one is supported")
    spec = groups[0].kv_cache_spec
    kind = FULL if isinstance(spec, FullAttentionSpec) else type(spec).__name__
    block_size = int(spec.block_size)
    model_heads = vllm_config.model_config.get_total_num_kv_heads()
    rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    replicas = max(1, size // model_heads)
    if rank % replicas:
        return {}

    known: dict[Any, PagedLayout] = {}
    layers = {}
    for name, cache in caches.items():
        attention = vllm_config.compilation_config.static_forward_context[name]
        heads = attention.num_kv_heads
        key = (type(attention.impl), cache.shape, cache.stride(), cache.dtype, heads)
        if key not in known:
            try:
                known[key] = probe(
                    cache,
                    kv_cache_config.num_blocks,
                    block_size,
                    heads,
                    attention.head_size,
                    layer_update(attention),
                )
            except LayoutError as error:
                raise LayoutError(f"layer {name}: {error}") from None
            logger.debug("layout of %s: %s", name, known[key])
        layers[name] = ExportedLayer(
            extract_layer_index(name), cache, known[key], rank // replicas * heads, kind
        )
    return layers


def updates_before_hook(vllm_config: VllmConfig, caches: dict[str, torch.Tensor]) -> bool:
    """Whether every layer's K and V are in the cache before ``wait_for_layer_load`` is called.

    vLLM calls that hook around the attention operator; backends with
    ``forward_includes_kv_cache_update = False`` update the cache in an operator before it.
    """
    context = vllm_config.compilation_config.static_forward_context
    backends = {getattr(context[name], "attn_backend", None) for name in caches}
    return all(getattr(b, "forward_includes_kv_cache_update", True) is False for b in backends)
