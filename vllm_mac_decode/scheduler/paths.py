"""Which of a receiver's addresses carries KV fastest: each is tried for a moment.

A name, or what a receiver announces, often leads to Wi-Fi although there is a cable. The control
connection may stay where it is: it carries little. That an address leads to the same receiver, the
data connection's handshake proves.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

import msgspec

from mlx_receiver.plugins import transport
from mlx_receiver.transports.transport import Sender, TransportError
from mlx_receiver.wire.addresses import is_this_machine, spelled
from mlx_receiver.wire.frames import Header, Kind
from mlx_receiver.wire.messages import DataPath, WireError
from vllm_mac_decode.export import DataTarget

logger = logging.getLogger("vllm.mac_decode.link")

#: Bytes and seconds that an address gets at most, and addresses that are tried.
PROBE_BYTES: Final = 64 << 20
_PROBE_SECONDS: Final = 0.5
_MOST: Final = 6
#: The same where only what is known is renewed: at least so many bytes, or as many as are known to
#: pass in that time; and how soon that may be repeated.
_AGAIN_BYTES: Final = (256 << 10, 16 << 20)
_AGAIN_SECONDS: Final = 0.1
#: It is tried so often at once while it turns out to be so many times as fast as was known.
_AGAIN_TIMES: Final = 4
_FASTER: Final = 1.5
_AGAIN_PAUSE: Final = 1.0
#: Seconds in which a connection must stand, and in which what was sent must be acknowledged.
_CONNECT_SECONDS: Final = 1.0
_ANSWER_SECONDS: Final = 2.0
_FRAME_BYTES: Final = 1 << 20
#: How often other addresses are looked for, and how soon after a measurement a broken path is.
_LOOK_SECONDS: Final = 2.0
_DOUBT_SECONDS: Final = 5.0
#: Another address must be that much faster than the one in use.
_BETTER: Final = 1.2

#: Of which transports addresses can be measured.
_MEASURED: Final = ("tcp",)


class Paths:
    """The way of one conversation's blocks. For the link's thread, except ``doubt``.

    Names are resolved and addresses measured in a thread of their own, one at a time: the link's
    must answer the receiver meanwhile.
    """

    def __init__(self, target: DataTarget, hosts: Callable[[], Sequence[str]]) -> None:
        """``target`` leads to the control connection's host; ``hosts`` are all that are known."""
        self._target = target
        self._hosts = hosts
        self._tried: frozenset[str] = frozenset()
        self._doubted = False
        self._measured_at = self._looked_at = self._again_at = 0.0
        self._thread: threading.Thread | None = None
        self._found: list[DataPath] = []
        #: Where blocks go, if that was measured.
        self.used: DataPath | None = None

    def first(self) -> DataTarget | None:
        """Where blocks go at first; None while the addresses are measured: then ask again."""
        if not self._has_choice:
            return self._target
        if self._thread is None:
            self._survey(broken=False)
            return None
        if self._thread.is_alive():
            return None
        self._thread = None
        self._take(logged=True)
        return self._target

    def doubt(self) -> None:
        """From any thread: blocks did not arrive."""
        self._doubted = True

    def look(self, idle: bool) -> DataTarget | None:
        """A better target, if one was found since the last call and may be used now: a faster one
        while no blocks are on their way (``idle``), or another one for one that broke."""
        if not self._has_choice:
            return None
        if self._thread is not None:
            if self._thread.is_alive() or (self._found and not (idle or self._doubted)):
                return None
            self._thread = None
            return self._target if self._take(logged=False) else None
        now = time.monotonic()
        if now - self._looked_at >= _LOOK_SECONDS:
            self._looked_at = now
            self._survey(self._doubted and now - self._measured_at > _DOUBT_SECONDS)
        return None

    def again(self) -> bool:
        """Measure the way that is used once more; ``used`` tells what came of it. False where that
        cannot be done."""
        now = time.monotonic()
        if self._target.endpoint.transport not in _MEASURED:
            return False
        if self._thread is not None or now - self._again_at < _AGAIN_PAUSE:
            return True
        self._again_at = now
        self._thread = threading.Thread(
            target=self._measure_again, name="mac-decode-paths", daemon=True
        )
        self._thread.start()
        return True

    def _measure_again(self) -> None:
        least, most = _AGAIN_BYTES
        latest = self.used
        known = latest.rate if latest is not None else most
        try:
            for _ in range(_AGAIN_TIMES):
                nbytes = min(max(least, int(_AGAIN_SECONDS * known)), most)
                found = measure(self._target.endpoint.host, self._target, nbytes, _AGAIN_SECONDS)
                latest = found or latest
                if found is None or nbytes == most or found.rate < _FASTER * known:
                    break
                known = found.rate  # and more, perhaps: few bytes are over before they are fast
            self.used = latest
        finally:
            if not self._has_choice:
                self._thread = None  # ``look`` does not look after it

    @property
    def _has_choice(self) -> bool:
        endpoint = self._target.endpoint
        return endpoint.transport in _MEASURED and not is_this_machine(endpoint.host)

    def _survey(self, broken: bool) -> None:
        """Begin to look for addresses, and to measure them if there are others than the last time,
        or if the present one is ``broken``."""
        self._thread = threading.Thread(
            target=self._measure, args=(broken,), name="mac-decode-paths", daemon=True
        )
        self._thread.start()

    def _measure(self, broken: bool) -> None:
        here = self._target.endpoint.host
        hosts = list(dict.fromkeys([here, *self._hosts()]))[:_MOST]
        if not broken and frozenset(hosts) == self._tried:
            return
        # One after the other: together they would share what they have in common.
        paths = [measure(host, self._target) for host in hosts]
        self._tried = frozenset(hosts)
        self._found = sorted((p for p in paths if p is not None), key=lambda path: -path.rate)
        self._measured_at = time.monotonic()

    def _take(self, logged: bool) -> bool:
        """Whether what was measured leads elsewhere."""
        found, self._found = self._found, []
        if not found:
            return False
        doubted, self._doubted = self._doubted, False
        best, here = found[0], self._target.endpoint.host
        present = next((path for path in found if path.host == here), None)
        moves = best.host != here and (
            present is None or doubted or best.rate > _BETTER * present.rate
        )
        if moves:
            endpoint = msgspec.structs.replace(self._target.endpoint, host=best.host)
            self._target = replace(self._target, endpoint=endpoint)
        self.used = used = best if moves or present is None else present
        if moves or logged:
            others = "; ".join(path.text for path in found if path is not used)
            logger.info("KV goes to %s%s", used.text, f", not to {others}" if others else "")
        return moves


def measure(
    host: str,
    target: DataTarget,
    nbytes: int = PROBE_BYTES,
    seconds: float = _PROBE_SECONDS,
) -> DataPath | None:
    """Send for a moment to one address; None where that does not work."""
    endpoint = msgspec.structs.replace(target.endpoint, host=host)
    try:
        sender = transport(endpoint.transport).connect(endpoint, target.ticket, _CONNECT_SECONDS)
    except (TransportError, ValueError) as error:
        logger.debug("%s is no way: %s", spelled(host, endpoint.port), error)
        return None
    try:
        began = time.perf_counter()
        _probe(sender, 1)
        _acknowledged(sender, 1)
        round_trip = time.perf_counter() - began
        began = time.perf_counter()
        frames, size = 0, min(nbytes, _FRAME_BYTES)
        while frames * size < nbytes:
            _probe(sender, size)
            frames += 1
            if time.perf_counter() - began > seconds:
                break
        _acknowledged(sender, frames)
        rate = frames * size / (time.perf_counter() - began)
        return DataPath(host, int(rate), int(1e9 * round_trip), getattr(sender, "mtu", 0))
    except (TransportError, WireError, TimeoutError) as error:
        logger.debug("%s is no way: %s", spelled(host, endpoint.port), error)
        return None
    finally:
        sender.close()


def _probe(sender: Sender, count: int) -> None:
    payload = [memoryview(bytes(count))]
    sender.send(Header(kind=Kind.PROBE, session=0, payload_bytes=count), payload)


def _acknowledged(sender: Sender, frames: int) -> None:
    """Wait until so many frames have been read. Raises TimeoutError."""
    until = time.monotonic() + _ANSWER_SECONDS
    while (frames := frames - len(sender.replies())) > 0:
        if time.monotonic() > until:
            raise TimeoutError("no answer to a probe")
        time.sleep(0.0005)
