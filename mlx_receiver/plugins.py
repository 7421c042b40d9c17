"""Extension points: pluggy hooks, found through the entry-point group ``mac_decode``.

They are the project's public interface, with ``transports.transport``, ``caches.adapter`` and
``wire.layout``, whose types they speak of.

The built-in transport and cache adapters register through the same hooks as anyone else's.
An entry point names a module (or object) that carries hook implementations::

    from mlx_receiver.plugins import hookimpl

    @hookimpl
    def mac_decode_transports():
        return [MyTransport()]
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pluggy

from mlx_receiver.transports.transport import Transport

__all__ = ["PROJECT", "Specifications", "hookimpl", "manager", "transport", "transports"]

PROJECT = "mac_decode"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class Specifications:
    """The hooks, called without arguments; each returns a list of what it adds."""

    @hookspec
    def mac_decode_transports(self) -> list[Transport]:  # type: ignore[empty-body]
        """Data transports (``mlx_receiver.transports.transport.Transport``)."""

    @hookspec
    def mac_decode_cache_adapters(self) -> list[Any]:  # type: ignore[empty-body]
        """Cache adapters (``mlx_receiver.caches.adapter.CacheAdapter``), asked on the receiver
        only: vLLM's side has no MLX to import that class with."""


@cache
def manager() -> pluggy.PluginManager:
    """The process's plugin manager, with every installed plugin loaded."""
    plugins = pluggy.PluginManager(PROJECT)
    plugins.add_hookspecs(Specifications)
    plugins.load_setuptools_entrypoints(PROJECT)
    return plugins


def transports() -> dict[str, Transport]:
    """Every registered transport by name; a later registration replaces an earlier one."""
    found = [item for group in manager().hook.mac_decode_transports() for item in group]
    return {transport.name: transport for transport in reversed(found)}


def transport(name: str) -> Transport:
    """The transport of that name. Raises ValueError listing those that exist."""
    known = transports()
    if name not in known:
        raise ValueError(f"unknown transport {name!r}; installed: {', '.join(sorted(known))}")
    return known[name]
