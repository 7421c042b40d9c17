"""Registers the built-in kinds of cache: for MLX's side, which imports mlx, and for vLLM's, which
imports vLLM. Each side asks for its own only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlx_receiver.plugins import hookimpl

if TYPE_CHECKING:
    from mlx_receiver.caches.adapter import CacheAdapter
    from vllm_mac_decode.worker.paged_cache import PagedAdapter


@hookimpl(trylast=True)
def mac_decode_cache_adapters() -> list[CacheAdapter]:
    """Those of ``mlx_receiver.caches``."""
    from mlx_receiver.caches.model import builtin_adapters

    return builtin_adapters()


@hookimpl(trylast=True)
def mac_decode_paged_caches() -> list[PagedAdapter]:
    """Those of ``vllm_mac_decode.worker``."""
    from vllm_mac_decode.worker.kinds import builtin_adapters

    return builtin_adapters()
