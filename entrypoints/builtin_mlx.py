"""Registers the built-in cache adapters. Asked on the receiver only: they import mlx."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlx_receiver.plugins import hookimpl

if TYPE_CHECKING:
    from mlx_receiver.caches.adapter import CacheAdapter


@hookimpl
def mac_decode_cache_adapters() -> list[CacheAdapter]:
    """Those of ``mlx_receiver.caches``."""
    from mlx_receiver.caches.model import builtin_adapters

    return builtin_adapters()
