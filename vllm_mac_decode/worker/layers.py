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
from vllm.model_executor.models.utils import extract_layer_index

from mlx_receiver import plugins
from mlx_receiver.wire.layout import checked
from vllm_mac_decode.worker.kinds import builtin_adapters
from vllm_mac_decode.worker.paged_cache import (
    AllocatedLayer,
    ExportedLayer,
    LayoutError,
    PagedAdapter,
    Readable,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


def exported_layers(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, caches: dict[str, Any]
) -> dict[str, ExportedLayer]:
    """This worker's layers by vLLM's layer name, also those of which another worker sends the same
    heads. Raises LayoutError when some layer cannot be exported."""
    groups = {
        name: (index, _spec(group.kv_cache_spec, name))
        for index, group in enumerate(kv_cache_config.kv_cache_groups)
        for name in group.layer_names
    }
    context = vllm_config.compilation_config.static_forward_context
    # Who reads another layer's cache has none of its own: that one travels once.
    names = [
        name
        for name in caches
        if getattr(context.get(name), "kv_sharing_target_layer_name", None) is None
    ]
    places = _places(names, vllm_config)  # first of all: every stage of a pipeline must ask
    own = {
        name: AllocatedLayer(
            name,
            groups[name][1],
            context[name],
            caches[name],
            kv_cache_config.num_blocks,
            vllm_config,
        )
        for name in names
    }
    known = adapters()
    readable = {name: _readable(layer, known) for name, layer in own.items()}
    found = {name: one for name, one in readable.items() if one is not None}
    if len(found) < len(own):
        specs = {type(own[name].spec).__name__ for name in own if name not in found}
        kinds = ", ".join(sorted(name.removesuffix("Spec") for name in specs))
        raise LayoutError(f"it has layers of the kinds {kinds}")

    rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    heads_of_model = vllm_config.model_config.get_total_num_kv_heads()
    layers = {}
    for name, one in found.items():
        group, spec = groups[name]
        head_start, sends = one.head_start, True
        replicas = size if one.replicated else max(1, size // max(1, heads_of_model))
        if head_start is None:
            if size > 1 and not one.replicated and not one.layout.parts[0].by_token:
                raise LayoutError(f"layer {name}: which part of it a worker has is not known")
            head_start = 0 if one.replicated else rank // replicas * one.layout.parts[0].heads
            sends = rank % replicas == 0
        layers[name] = ExportedLayer(
            places[name], one.cache, one.layout, head_start, one.kind, int(spec.block_size), group,
            one.window, sends=sends, chunk=one.chunk,
        )  # fmt: skip
    return _side_by_side(layers)


def adapters() -> list[PagedAdapter]:
    """What can read caches, the built-in ones last: the first that knows a layer exports it."""
    return plugins.added("mac_decode_paged_caches", "readable") or builtin_adapters()


def _readable(layer: AllocatedLayer, known: Iterable[PagedAdapter]) -> Readable | None:
    """Raises LayoutError, also where an adapter fails: whose layers those are is not known then."""
    for adapter in known:
        try:
            found = adapter.readable(layer)
            if found is not None:
                _check(found, int(layer.spec.block_size))
                return found
        except LayoutError as error:
            raise LayoutError(f"layer {layer.name}: {error}") from None
        except (Exception, SystemExit) as error:
            said = f"{type(error).__name__}: {error}"
            raise LayoutError(
                f"layer {layer.name}: the plugin {plugins.named(adapter)} failed: {said}"
            ) from error
    return None


def _check(found: Readable, block_size: int) -> None:
    """Raise ValueError for what cannot be exported."""
    layout = found.layout
    layer = ExportedLayer(
        0, found.cache, layout, 0, found.kind, block_size, window=found.window, chunk=found.chunk
    )
    checked(layer.described())
    if len({part.by_token for part in layout.parts}) > 1:
        raise ValueError("some of its parts have rows for tokens and some have not")
    if layer.by_token and (layout.block_size < 1 or block_size % layout.block_size):
        raise ValueError(f"{layout.block_size} tokens do not divide a block of {block_size}")


def _places(names: Iterable[str], config: VllmConfig) -> dict[str, int]:
    """Each layer's place among those of the model that have a cache.

    A layer's second cache may go by a number behind all layers' (Falcon-H1).
    """
    total = config.model_config.hf_text_config.num_hidden_layers
    indexes, problem = {}, ""
    try:
        indexes = {name: int(extract_layer_index(name)) % total for name in names}
    except (AssertionError, ValueError) as error:
        problem = f"the place of a layer is not known: {error}"
    found = set(indexes.values())
    if config.parallel_config.pipeline_parallel_size > 1:
        found = _of_all_stages(found)  # the others wait for this one's, whatever it found
    if problem:
        raise LayoutError(problem)
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


def _spec(spec: Any, name: str) -> Any:
    """The layer's own, where those of a group differ (``UniformTypeKVCacheSpecs``)."""
    specs = getattr(spec, "kv_cache_specs", None)
    return specs[name] if specs is not None else spec


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
