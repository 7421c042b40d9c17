"""Finding receivers: what is announced on the links of this machine, and the ways to it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TYPE_CHECKING, Any, Final

from mlx_receiver.discovery.links import Link, Own, links, way_to
from mlx_receiver.discovery.service import SERVICE_TYPE, Announced, decode
from mlx_receiver.discovery.stations import Station, Stations
from mlx_receiver.discovery.trouble import Trouble
from mlx_receiver.interfaces import Interface, Kind, preference, present

if TYPE_CHECKING:
    from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo

logger = logging.getLogger(__name__)

_TROUBLE: Final = (
    "receivers on the network cannot be found, since multicast DNS does not work (%s): name the "
    "receiver's address with --mac-decode-receiver"
)
#: Services that are looked at, on each link and all together, and addresses of each.
MOST_SERVICES: Final = 64
MOST_ADDRESSES: Final = 16

#: Longest name in DNS.
_LONGEST_NAME: Final = 255
#: Milliseconds for which a service is asked for what is not known of it.
_ASK_MS: Final = 3000
#: Seconds between such attempts while it does not answer.
_AGAIN_SECONDS: Final = (2.0, 5.0, 15.0, 60.0)
#: What a service consists of in DNS: A, TXT, AAAA, SRV.
_RECORDS: Final = (1, 16, 28, 33)
#: Seconds after the end of a record at which its successor is asked for.
_LATER_SECONDS: Final = 0.1
#: Seconds for which changes are gathered before they are shown.
_GATHER_SECONDS: Final = 0.05


@dataclass(frozen=True, slots=True)
class Way:
    """An address of a receiver. ``host`` is numeric, with its scope where it needs one
    (``fe80::1%en0``); ``interface`` is the one that leads there."""

    host: str
    interface: str
    kind: Kind


@dataclass(frozen=True, slots=True)
class Found:
    """A receiver. ``port`` is its control port; ``addresses`` has the best first; ``seen`` is the
    monotonic time at which it was last heard of."""

    announced: Announced
    port: int
    addresses: tuple[Way, ...]
    seen: float


@dataclass(frozen=True, slots=True)
class _Service:
    """What one link says of one service."""

    announced: Announced
    port: int
    addresses: tuple[IPv4Address | IPv6Address, ...]
    seen: float
    #: Seconds for which its records count.
    lasts: float


@dataclass(eq=False)
class _Name:
    """A service's name on one link."""

    task: asyncio.Task[None] | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    asked: bool = False
    service: _Service | None = None


class Browser:
    """Looks for receivers until ``close``, in a thread of its own. It raises nothing: where
    multicast does not work, it says so once in the log and keeps trying.
    """

    def __init__(self, changed: Callable[[], None] | None = None) -> None:
        """``changed`` is called in that thread whenever ``found`` says something else."""
        self._changed = changed
        self._condition = threading.Condition()
        self._found: tuple[Found, ...] = ()
        self._news = False
        self._trouble = Trouble(logger, _TROUBLE)
        self._links: list[Link] = []
        self._routes: dict[str, tuple[Link, bool] | None] = {}
        self._interfaces: dict[str, Interface] = {}
        self._interfaces_of: list[Link] | None = None
        self._browsers: dict[Station, AsyncServiceBrowser] = {}
        self._names: dict[Station, dict[str, _Name]] = {}
        self._showing: asyncio.TimerHandle | None = None
        self._stations = Stations("browse", self, self._trouble.is_certain)
        self._stations.start()

    def found(self) -> list[Found]:
        """The receivers that there are now, those first that were found first."""
        with self._condition:
            self._news = False
            return list(self._found)

    def wait(self, seconds: float) -> bool:
        """Whether ``found`` says something else than the last time, or does so within that time."""
        with self._condition:
            return self._condition.wait_for(lambda: self._news, seconds)

    @property
    def trouble(self) -> str:
        """Why nothing can be found, "" while something could be."""
        return self._trouble.text

    def close(self) -> None:
        """Stop looking: nothing is found any more."""
        self._stations.close()
        with self._condition:
            self._found = ()

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- ``Keeper``, in the stations' thread ----------------------------------------------------

    def wanted(self) -> Sequence[tuple[Link, tuple[Own, ...]]]:
        self._links = links()
        return [(link, ()) for link in self._links]

    async def opened(self, station: Station) -> None:
        from zeroconf import DNSQuestionType, ServiceStateChange
        from zeroconf.asyncio import AsyncServiceBrowser

        names = self._names[station] = {}

        def heard(name: str, state_change: ServiceStateChange, **_: Any) -> None:
            if state_change is ServiceStateChange.Removed:
                self._drop(names, name)
            elif name in names:
                names[name].changed.set()
            else:
                self._take(station, name)

        self._browsers[station] = AsyncServiceBrowser(
            station.responder.zeroconf,
            SERVICE_TYPE,
            handlers=[heard],
            # An answer to this machine alone would reach one of the programs that share the port.
            question_type=DNSQuestionType.QM,
        )

    async def closing(self, station: Station, goodbye: bool) -> None:
        browser = self._browsers.pop(station, None)
        if browser is not None:
            await browser.async_cancel()
        names = self._names.pop(station, {})
        for name in list(names):
            self._drop(names, name)

    async def checked(self, stations: Sequence[Station], failures: dict[str, str]) -> None:
        self._routes.clear()
        if self._links != self._interfaces_of:
            # On macOS other programs are asked.
            present_now = await asyncio.to_thread(present)
            self._interfaces = {interface.name: interface for interface in present_now}
            self._interfaces_of = self._links
            self._show_soon()
        outward = [link for link in self._links if not link.loopback]
        if any(station.link.name == link.name for station in stations for link in outward):
            outward = []
        self._trouble.lasts(
            "; ".join(
                f"{link.name}: {failures.get(link.name, 'it takes no multicast')}"
                for link in outward[:4]
            )
        )

    def _take(self, station: Station, name: str) -> None:
        """Follow a name; when there are too many, instead of one that was asked in vain."""
        names = self._names[station]
        if not name.lower().endswith(f".{SERVICE_TYPE}") or len(name) > _LONGEST_NAME:
            return
        if len(names) >= MOST_SERVICES:
            silent = [other for other, k in names.items() if k.asked and k.service is None]
            if not silent:
                return
            self._drop(names, silent[0])
        known = names[name] = _Name()
        known.task = asyncio.ensure_future(self._follow(station, name, known))

    def _drop(self, names: dict[str, _Name], name: str) -> None:
        known = names.pop(name, None)
        if known is not None:
            if known.task is not None:
                known.task.cancel()
            if known.service is not None:
                self._show_soon()

    async def _follow(self, station: Station, name: str, known: _Name) -> None:
        """Know what a service says, until it is dropped: when its records expire it is asked."""
        from zeroconf import DNSQuestionType
        from zeroconf.asyncio import AsyncServiceInfo

        silent = 0
        while True:
            known.changed.clear()
            service = None
            info = AsyncServiceInfo(SERVICE_TYPE, name)
            try:
                if await info.async_request(
                    station.responder.zeroconf, _ASK_MS, DNSQuestionType.QM
                ):
                    service = _read(info, station)
            except Exception:  # a name that the library does not take
                logger.debug("a service cannot be asked", exc_info=True)
            known.asked = True
            if service != known.service:
                known.service = service
                self._show_soon()
            if service is not None:
                silent, pause = 0, service.lasts
            else:
                pause = _AGAIN_SECONDS[min(silent, len(_AGAIN_SECONDS) - 1)]
                silent += 1
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(known.changed.wait(), pause)

    def _show_soon(self) -> None:
        if self._showing is None:
            self._showing = asyncio.get_running_loop().call_later(_GATHER_SECONDS, self._show)

    def _show(self) -> None:
        self._showing = None
        found = self._gathered()
        same = [replace(one, seen=0.0) for one in found]
        with self._condition:
            before, self._found = self._found, found
            if same == [replace(one, seen=0.0) for one in before]:
                return
            self._news = True
            self._condition.notify_all()
        if self._changed is not None:
            try:
                self._changed()
            except Exception:
                logger.exception("a change of the receivers that are found was not taken up")

    def _gathered(self) -> tuple[Found, ...]:
        """One receiver for all that the links say of it. Another key is another receiver."""
        said: dict[tuple[str, int, str], list[tuple[_Service, Link]]] = {}
        for station, names in self._names.items():
            for known in names.values():
                if known.service is not None:
                    one, port = known.service.announced, known.service.port
                    said.setdefault((one.instance, port, one.key), []).append(
                        (known.service, station.link)
                    )
        order = {
            (f.announced.instance, f.port, f.announced.key): n for n, f in enumerate(self._found)
        }
        found = []
        for who in sorted(said, key=lambda who: order.get(who, len(order)))[:MOST_SERVICES]:
            newest = max((service for service, _ in said[who]), key=lambda service: service.seen)
            addresses = self._ways(said[who])
            if addresses:
                found.append(Found(newest.announced, newest.port, addresses, newest.seen))
        return tuple(found)

    def _ways(self, said: Iterable[tuple[_Service, Link]]) -> tuple[Way, ...]:
        """How to get to the addresses, the best way first: by the loopback, without a router, by
        the best interface; else those that were heard of first."""
        ranked: dict[str, tuple[Any, Way]] = {}
        for service, heard_on in said:
            for address in service.addresses:
                link, near = heard_on, True
                host = str(address)
                if address.version == 6 and address.is_link_local:
                    host = f"{address}%{link.name}"
                else:
                    way = self._way_to(host)
                    if way is None:
                        continue
                    link, near = way
                interface = self._interfaces.get(link.name) or Interface(link.name, "virtual", ())
                rank = (
                    not address.is_loopback,
                    not near,
                    preference(interface),
                    address.version,
                    address.is_link_local,
                )
                ranked.setdefault(host, (rank, Way(host, link.name, interface.kind)))
        best = sorted(ranked.values(), key=lambda ranked: ranked[0])
        return tuple(way for _, way in best[:MOST_ADDRESSES])

    def _way_to(self, host: str) -> tuple[Link, bool] | None:
        """``way_to``, asked once between two looks at the links."""
        if host not in self._routes:
            self._routes[host] = way_to(host, self._links)
        return self._routes[host]


def discover(seconds: float) -> list[Found]:
    """The receivers that are found within that time."""
    with Browser() as browser:
        time.sleep(seconds)
        return browser.found()


def _read(info: AsyncServiceInfo, station: Station) -> _Service | None:
    """What records say that anybody may have sent; None where they do not say it."""
    from zeroconf import IPVersion

    announced = decode(info.text or b"")
    if announced is None or not info.port or not 0 < info.port < 65536 or info.server is None:
        return None
    found = dict.fromkeys(
        ip_address(number.packed) for number in info.ip_addresses_by_version(IPVersion.All)
    )
    addresses = [address for address in found if _plausible(address, station.link)]
    if not addresses:
        return None
    cache = station.responder.zeroconf.cache
    now = time.monotonic() * 1000
    records = [
        record
        for name in (info.name, info.server)
        for record in cache.async_entries_with_name(name)
        if record.type in _RECORDS and not record.is_expired(now)
    ]
    lasts = min((record.get_remaining_ttl(now) for record in records), default=0)
    seen = max((record.created for record in records), default=now) / 1000
    chosen = tuple(sorted(addresses, key=lambda address: (address.version, address.packed)))
    return _Service(announced, info.port, chosen[:MOST_ADDRESSES], seen, lasts + _LATER_SECONDS)


def _plausible(address: IPv4Address | IPv6Address, heard_on: Link) -> bool:
    """Whether a connection to an address is what a receiver on that link can mean."""
    if address.is_multicast or address.is_unspecified or getattr(address, "ipv4_mapped", None):
        return False
    return heard_on.loopback or not address.is_loopback
