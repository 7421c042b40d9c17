"""Extension points: pluggy hooks, found through the entry-point group ``mac_decode``.

They are the project's public interface, with ``transports.transport``, ``caches.adapter``,
``wire.layout`` and ``vllm_mac_decode.worker.paged_cache``, whose types they speak of; there is a
worked example in ``docs/extending.md``.

The built-in transports and kinds of cache register through the same hooks as anyone else's, and
are asked last. A plugin that fails is named in the log, once, and left out.
An entry point names a module (or object) that carries hook implementations::

    from mlx_receiver.plugins import hookimpl

    @hookimpl
    def mac_decode_transports():
        return [MyTransport()]
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.metadata import entry_points
from typing import Any

import pluggy

from mlx_receiver.transports.transport import Transport

__all__ = [
    "PROJECT",
    "Specifications",
    "added",
    "blame",
    "hookimpl",
    "manager",
    "named",
    "packages",
    "transport",
    "transports",
]

logger = logging.getLogger(__name__)

PROJECT = "mac_decode"
_OWN = "vllm-mac-decode"

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

    @hookspec
    def mac_decode_paged_caches(self) -> list[Any]:  # type: ignore[empty-body]
        """What can read vLLM's caches (``vllm_mac_decode.worker.paged_cache.PagedAdapter``), asked
        in vLLM's workers only."""


@cache
def manager() -> pluggy.PluginManager:
    """The process's plugin manager, with every installed plugin loaded."""
    plugins = pluggy.PluginManager(PROJECT)
    plugins.add_hookspecs(Specifications)
    for entry in entry_points(group=PROJECT):
        package = f" ({entry.dist.name})" if entry.dist is not None else ""
        name = f"{entry.name}{package}"  # another package may call its own the same
        # What another package does when it is imported must end neither engine.
        try:
            plugins.register(entry.load(), name=name)
        except (Exception, SystemExit) as error:
            if plugins.has_plugin(name):
                plugins.unregister(name=name)
            blame(name, "cannot be loaded", error)
    return plugins


def added(hook: str, attribute: str) -> list[Any]:
    """What the plugins add through that hook, the built-in ones' last; each has the
    ``attribute``."""
    found = []
    for implementation in reversed(getattr(manager().hook, hook).get_hookimpls()):
        try:
            items = list(implementation.function())
            for item in items:
                getattr(item, attribute)
        except (Exception, SystemExit) as error:
            blame(implementation.plugin_name, f"cannot answer {hook}", error)
        else:
            found += items
    return found


def packages() -> list[str]:
    """The other packages that are installed for a hook, each with its version."""
    distributions = [entry.dist for entry in entry_points(group=PROJECT)]
    return sorted({f"{d.name} {d.version}" for d in distributions if d and d.name != _OWN})


def named(item: Any) -> str:
    """What a plugin added, by its class: ``package.module.Class``."""
    return f"{type(item).__module__}.{type(item).__qualname__}"


def blame(who: str, what: str, error: BaseException) -> None:
    """Say, once, that a plugin does not work."""
    _say(f"the plugin {who} {what} and is left out: {type(error).__name__}: {error}")


@cache
def _say(text: str) -> None:
    logger.error(text)


def transports() -> dict[str, Transport]:
    """Every registered transport by name; a built-in one may be replaced."""
    found: list[Transport] = added("mac_decode_transports", "name")
    return {transport.name: transport for transport in reversed(found)}


def transport(name: str) -> Transport:
    """The transport of that name. Raises ValueError listing those that exist."""
    known = transports()
    if name not in known:
        raise ValueError(f"unknown transport {name!r}; installed: {', '.join(sorted(known))}")
    return known[name]
