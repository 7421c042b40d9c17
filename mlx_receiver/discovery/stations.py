"""Multicast DNS on every link: one of python-zeroconf's responders for each link and IP version.

A single one for all links would mix up what was heard where: its cache has no place for the link
that a link-local address belongs to, and it would say every address on every link. So each has its
own, whose sockets hear and speak on that link only. They share one thread and its event loop, which
looks at the links again every other second.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

from mlx_receiver.discovery.links import Link, Own

if TYPE_CHECKING:
    from zeroconf.asyncio import AsyncZeroconf

_Key = tuple[int, str, int, tuple[Own, ...], tuple[Own, ...]]

logger = logging.getLogger(__name__)

#: Seconds between two looks at the links.
CHECK_SECONDS: Final = 2.0
#: A clock that has run on for so many seconds while this process has not: the machine has slept.
_SLEPT_SECONDS: Final = 10.0
#: Seconds for which whoever closes it waits.
_CLOSE_SECONDS: Final = 3.0


@dataclass(eq=False)
class Station:
    """A responder on one link. ``addresses`` are those of the link that are to be announced."""

    link: Link
    addresses: tuple[Own, ...]
    version: int
    responder: AsyncZeroconf
    opened: float = field(default_factory=time.monotonic)


class Keeper(Protocol):
    """Whoever has stations; everything is called in their thread."""

    def wanted(self) -> Sequence[tuple[Link, tuple[Own, ...]]]:
        """The links to work on, and the addresses to announce there."""

    async def opened(self, station: Station) -> None:
        """A station has begun to hear."""

    async def closing(self, station: Station, goodbye: bool) -> None:
        """A station is about to end: for good, which the others may be told, or for its link."""

    async def checked(self, stations: Sequence[Station], failures: dict[str, str]) -> None:
        """The links have been looked at. ``failures`` says why a station of a link, which it names,
        could not be opened."""


class Stations:
    """The thread. ``start``, ``wake`` and ``close`` are for any other and raise nothing."""

    def __init__(self, name: str, keeper: Keeper, failed: Callable[[str], None]) -> None:
        """``failed`` is told, in the thread, why there is no discovery at all."""
        self._keeper = keeper
        self._failed = failed
        self._stations: dict[_Key, Station] = {}
        self._closing = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake = asyncio.Event()
        #: How far this machine's clock was ahead of the one that stops while it sleeps.
        self._ahead = time.time() - time.monotonic()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin."""
        try:
            self._thread.start()
        except RuntimeError as error:  # no more threads
            self._failed(str(error))

    def wake(self) -> None:
        """Look at everything now."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._wake.set)

    def close(self) -> None:
        """End, with a goodbye on every link, and wait a while for that."""
        self._closing = True
        self.wake()
        if self._thread.ident is not None and threading.current_thread() is not self._thread:
            self._thread.join(_CLOSE_SECONDS)

    # --- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        # What the library has to say about a socket is said once here, and as what it means.
        library = logging.getLogger("zeroconf")
        if library.getEffectiveLevel() > logging.DEBUG:
            library.setLevel(logging.CRITICAL)
        try:
            asyncio.run(self._main())
        except Exception as error:
            logger.debug("discovery ended", exc_info=True)
            self._failed(f"{type(error).__name__}: {error}")

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            while not self._closing:
                self._wake.clear()
                try:
                    await self._check()
                except Exception as error:
                    logger.debug("the links could not be looked at", exc_info=True)
                    self._failed(f"{type(error).__name__}: {error}")
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), CHECK_SECONDS)
        finally:
            await asyncio.gather(*(self._end(station, True) for station in self._stations.values()))

    async def _check(self) -> None:
        wanted = {
            _key(link, addresses, version): (link, addresses, version)
            for link, addresses in self._keeper.wanted()
            for version in _versions(link)
        }
        ahead = time.time() - time.monotonic()
        slept, self._ahead = ahead - self._ahead > _SLEPT_SECONDS, ahead
        over = [key for key in self._stations if slept or key not in wanted]
        await asyncio.gather(*(self._end(self._stations.pop(key), False) for key in over))
        failures: dict[str, str] = {}
        for key in [key for key in wanted if key not in self._stations]:
            link, addresses, version = wanted[key]
            try:
                self._stations[key] = await self._open(link, addresses, version)
            except Exception as error:  # whatever the library and the system have thought of
                logger.debug("no multicast on %s", link.name, exc_info=True)
                failures[link.name] = getattr(error, "strerror", None) or str(error) or repr(error)
        await self._keeper.checked(list(self._stations.values()), failures)

    async def _open(self, link: Link, addresses: tuple[Own, ...], version: int) -> Station:
        from zeroconf import IPVersion
        from zeroconf.asyncio import AsyncZeroconf

        chosen: list[Any] = [link.index]
        if version == 4:
            chosen = [str(own.ip) for own in link.addresses if own.version == 4][:1]
        responder = AsyncZeroconf(
            interfaces=chosen, ip_version=IPVersion.V4Only if version == 4 else IPVersion.V6Only
        )
        station = Station(link, addresses, version, responder)
        try:
            await responder.zeroconf.async_wait_for_start()
            _confine(responder, link)
            if not responder.zeroconf.engine.senders:
                raise OSError("the address cannot be used yet")
            await self._keeper.opened(station)
        except BaseException:
            await self._end(station, False)
            raise
        return station

    async def _end(self, station: Station, goodbye: bool) -> None:
        try:
            await self._keeper.closing(station, goodbye)
            await station.responder.async_close()
        except Exception:
            logger.debug("a station on %s did not end well", station.link.name, exc_info=True)


def _key(link: Link, addresses: tuple[Own, ...], version: int) -> _Key:
    """What must stay the same for a station to stay: its sockets have the link's addresses."""
    own = tuple(own for own in link.addresses if own.version == version)
    return link.index, link.name, version, own, addresses


def _versions(link: Link) -> Sequence[int]:
    """IP versions to be used on a link. On the loopback one is enough."""
    if not link.multicast:
        return []
    versions = sorted({own.version for own in link.addresses})
    return versions[:1] if link.loopback else versions


def _confine(responder: AsyncZeroconf, link: Link) -> None:
    """Let a responder hear its own link alone.

    Linux gives a socket what comes for a group on any link where any socket has joined it; macOS
    keeps to those that the socket itself has joined.
    """
    device = getattr(socket, "SO_BINDTODEVICE", None)
    if device is None:
        return
    for reader in responder.zeroconf.engine.readers:
        try:
            reader.transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, device, link.name.encode()
            )
        except OSError as error:  # kernels before 5.7 want root
            logger.debug("a socket hears more than %s: %s", link.name, error)
    # What came between the opening of the sockets and now.
    cache = responder.zeroconf.cache
    for name in cache.names():
        cache.async_remove_records(cache.async_entries_with_name(name))
