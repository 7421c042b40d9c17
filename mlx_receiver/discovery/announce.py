"""The receiver's side: says on every link that it is there, and where."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from mlx_receiver.discovery.links import Link, Own, covered, links
from mlx_receiver.discovery.service import SERVICE_TYPE, Announced, cut, encode
from mlx_receiver.discovery.stations import Station, Stations
from mlx_receiver.discovery.trouble import Trouble
from mlx_receiver.settings import is_loopback

if TYPE_CHECKING:
    from zeroconf import ServiceInfo

logger = logging.getLogger(__name__)

#: Seconds after which others forget a receiver that has died without a goodbye. They ask again
#: before: a question and an answer for each that looks for receivers.
TTL_SECONDS: Final = 30
_TROUBLE: Final = (
    "others cannot find this receiver, since multicast DNS does not work (%s): give vLLM its "
    "address with --mac-decode-receiver; --no-discovery switches this off"
)
#: Addresses announced on one link.
_MOST_ADDRESSES: Final = 16
#: Bytes of a DNS label.
_LABEL: Final = 63


class Announcer:
    """Announces a receiver until ``close``, in a thread of its own.

    On every link that ``host`` covers, with that link's addresses only; one that appears later is
    taken up within seconds. It raises nothing: where multicast does not work, it says so once in
    the log and keeps trying.

    There is no probing for conflicts (RFC 6762, 8.1): names hold the instance, the port and the
    link, so that several receivers on one machine, machines of one name, and two links into one
    network have different ones.
    """

    def __init__(
        self, announced: Announced, port: int, host: str = "*", *, ttl: int = TTL_SECONDS
    ) -> None:
        """``port`` is the control port, ``host`` what the receiver listens on."""
        self._announced = announced
        #: What the service is called keeps to what was said first.
        self._first = announced
        self._port = port
        self._host = host
        self._ttl = ttl
        self._links: list[Link] | None = None
        self._covered: Sequence[tuple[Link, tuple[Own, ...]]] = ()
        self._infos: dict[Station, ServiceInfo] = {}
        self._sending: set[asyncio.Future[None]] = set()
        self._heard: set[Station] = set()
        self._trouble = Trouble(logger, _TROUBLE)
        self._stations = Stations("announce", self, self._trouble.is_certain)
        self._stations.start()

    @property
    def trouble(self) -> str:
        """Why nobody can hear the announcements, "" while somebody can."""
        return self._trouble.text

    def update(self, announced: Announced) -> None:
        """Say something else from now on."""
        if announced != self._announced:
            self._announced = announced
            self._stations.wake()

    def close(self) -> None:
        """Say goodbye and end."""
        self._stations.close()

    # --- ``Keeper``, in the stations' thread ----------------------------------------------------

    def wanted(self) -> Sequence[tuple[Link, tuple[Own, ...]]]:
        found = links()
        if found != self._links:  # the host may be a name, which takes a while
            try:
                chosen = covered(self._host, found)
            except OSError as error:
                logger.debug("%s has no address: %s", self._host, error)
                return []
            self._links = found
            self._covered = [(link, addresses[:_MOST_ADDRESSES]) for link, addresses in chosen]
        return self._covered

    async def opened(self, station: Station) -> None:
        info = self._info(station)
        # No probing: see above.
        sending = await station.responder.async_register_service(info, cooperating_responders=True)
        self._infos[station] = info
        self._keep(asyncio.ensure_future(sending))

    async def closing(self, station: Station, goodbye: bool) -> None:
        self._heard.discard(station)
        info = self._infos.pop(station, None)
        if info is not None and not goodbye:
            # Closing says goodbye for all that is registered.
            station.responder.zeroconf.registry.async_remove(info)

    async def checked(self, stations: Sequence[Station], failures: dict[str, str]) -> None:
        text = encode(self._announced)
        for station in stations:
            if self._infos[station].text != text:
                info = self._infos[station] = self._info(station)
                sending = await station.responder.async_update_service(info)
                self._keep(asyncio.ensure_future(sending))
            cache = station.responder.zeroconf.cache
            if cache.async_entries_with_name(self._infos[station].name):
                self._heard.add(station)
        self._trouble.lasts(self._reason(failures))

    def _keep(self, sending: asyncio.Future[None]) -> None:
        self._sending.add(sending)
        sending.add_done_callback(self._sending.discard)

    def _reason(self, failures: dict[str, str]) -> str:
        """Why the announcements are heard on no link to other machines, "" where they are: what is
        sent to a group comes back to its sender, too. For a receiver of this machine alone the
        loopback counts."""
        counts = [link for link, _ in self._covered if is_loopback(self._host) or not link.loopback]
        if any(station.link.name == link.name for station in self._heard for link in counts):
            return ""
        return "; ".join(f"{link.name}: {_silence(link, failures)}" for link in counts[:4])

    def _info(self, station: Station) -> ServiceInfo:
        from zeroconf import ServiceInfo

        link = station.link.name
        machine = f"{self._first.instance[:16]}-{self._port}-{link}"
        return ServiceInfo(
            SERVICE_TYPE,
            f"{label(self._first, self._port, link)}.{SERVICE_TYPE}",
            port=self._port,
            properties=encode(self._announced),
            # Not the host's own name, which the system's responder answers for.
            server=f"mlx-{_plain(machine)}.local.",
            addresses=[own.ip.packed for own in station.addresses],
            host_ttl=self._ttl,
        )


def label(announced: Announced, port: int, link: str) -> str:
    """The name of the service on a link, as other programs that browse show it: one DNS label."""
    unique = _plain(f" {announced.instance[:8]} {port} {link}")
    return cut(_plain(announced.name), _LABEL - len(unique.encode())) + unique


def _plain(text: str) -> str:
    """Without dots, which would divide it, and without what is special elsewhere."""
    return re.sub(r"[^\w -]|_", "-", text)


def _silence(link: Link, failures: dict[str, str]) -> str:
    if not link.multicast:
        return "it takes no multicast"
    return failures.get(link.name, "what is sent there does not come back")
