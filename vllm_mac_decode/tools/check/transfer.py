"""How fast KV reaches the receiver's memory over one address, and through which interface."""

from __future__ import annotations

import secrets
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import msgspec

from mlx_receiver.plugins import transport
from mlx_receiver.transports.transport import Sender
from mlx_receiver.wire import messages as m
from mlx_receiver.wire.addresses import Address
from mlx_receiver.wire.frames import blocks
from mlx_receiver.wire.layout import CacheLayout
from mlx_receiver.wire.sampling import Sampling
from vllm_mac_decode.tools.check.conversation import Conversation

#: Bytes to send, and seconds to send them for.
TRANSFER_BYTES: Final = 256 << 20
TRANSFER_SECONDS: Final = 10.0

_FRAME_BYTES: Final = 8 << 20
_CONNECT_SECONDS: Final = 5.0
#: Seconds for memory to be reserved, and for what was sent to arrive.
_PATIENCE: Final = 30.0
_PING_SECONDS: Final = 0.2


class TransferError(Exception):
    """The transfer could not be timed; the text says why."""


@dataclass(frozen=True)
class Transfer:
    """Bytes of K and V that were sent, and the seconds until all of them were in the receiver's
    cache; the largest packet on the way, 0 where that is not known."""

    nbytes: int
    seconds: float
    mtu: int = 0

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.nbytes / self.seconds

    @property
    def text(self) -> str:
        """The rate and the MTU."""
        return f"{self.rate / 1e9:.2f} GB/s" + (f", MTU {self.mtu}" if self.mtu else "")


def time_transfer(
    talk: Conversation,
    welcome: m.Welcome,
    address: Address,
    name: str,
    plain: bool,
    layout: CacheLayout,
) -> Transfer:
    """Fill caches of sessions with zeros over that address, as hand-offs would, and drop them.

    ``name`` is the transport's, ``plain`` this side's ``plain_data``. Raises TransferError when the
    receiver refuses, TransportError when the data path does not open or breaks, WireError for
    answers that cannot be read.
    """
    offered = next(endpoint for endpoint in welcome.endpoints if endpoint.transport == name)
    endpoint = msgspec.structs.replace(offered, host=address.host, plain=plain and offered.plain)
    sender = transport(name).connect(endpoint, welcome.ticket, _CONNECT_SECONDS)
    most = TRANSFER_BYTES // layout.bytes_per_token
    tokens = max(1, min(most, welcome.max_tokens - 2))
    done = Transfer(0, 0.0, getattr(sender, "mtu", 0))
    try:
        # A small model's context holds only a part of the bytes.
        for _ in range(max(1, most // tokens)):
            more = _fill(talk, sender, tokens, layout)
            done = Transfer(done.nbytes + more.nbytes, done.seconds + more.seconds, done.mtu)
            if done.seconds > TRANSFER_SECONDS / 2:
                break
    finally:
        sender.close()
    return done


def _fill(talk: Conversation, sender: Sender, tokens: int, layout: CacheLayout) -> Transfer:
    """One session of so many tokens."""
    session = secrets.randbits(62)
    try:
        talk.send(m.Open(session, "mac-decode check", [0] * tokens, Sampling(max_tokens=1)))
        _opened(talk, session)
        began = time.monotonic()
        sent = _send(talk, sender, session, tokens, layout)
        return Transfer(sent, _arrived(talk, session, sent) - began)
    finally:
        talk.send(m.Cancel(session, "measured"))


def _opened(talk: Conversation, session: int) -> None:
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        talk.send(m.Ping(time.monotonic_ns()))
        match talk.receive(_PING_SECONDS):
            case m.Opened(opened) if opened == session:
                return
            case m.Refused() | m.Failed() | m.Rejected() as no:
                raise TransferError(f"the receiver refuses: {no.reason}")
    raise TransferError("the receiver does not answer")


def _send(
    talk: Conversation, sender: Sender, session: int, tokens: int, layout: CacheLayout
) -> int:
    """Send every block, or as many as the time allows; their bytes."""
    began = pinged = time.monotonic()
    sent = 0
    zeros = memoryview(bytes(_FRAME_BYTES))
    for header in blocks(session, tokens, layout, _FRAME_BYTES):
        now = time.monotonic()
        if now - began > TRANSFER_SECONDS:
            return sent
        if now - pinged > _PING_SECONDS:
            talk.send(m.Ping(time.monotonic_ns()))
            pinged = now
        clock = time.monotonic_ns()
        timed = replace(header, computed_ns=clock, gathered_ns=clock, sent_ns=clock)
        sender.send(timed, [zeros[: header.payload_bytes]])
        sent += header.payload_bytes
    return sent


def _arrived(talk: Conversation, session: int, sent: int) -> float:
    """When the receiver said that it has all of them."""
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        answer = talk.receive(_PING_SECONDS / 4)
        match answer:
            case None:
                talk.send(m.Ping(time.monotonic_ns()))
            case m.Complete(complete) if complete == session:
                return time.monotonic()
            case m.Status():
                if any(row.session == session and row.kv_bytes >= sent for row in answer.sessions):
                    return time.monotonic()
            case m.Failed() | m.Rejected():
                raise TransferError(f"the receiver gives up: {answer.reason}")
    raise TransferError(f"{sent >> 20} MiB were sent, but did not arrive")


@dataclass(frozen=True)
class Interface:
    """Through which an address is reached; ``name`` is empty where that cannot be told, ``mbits``
    0 where the system does not say."""

    name: str = ""
    wifi: bool = False
    mbits: int = 0

    @property
    def text(self) -> str:
        """``eth0, 10 Gbit/s`` or ``wlan0, Wi-Fi``."""
        speed = f"{self.mbits / 1000:g} Gbit/s" if self.mbits else ""
        return ", ".join(filter(None, [self.name, "Wi-Fi" if self.wifi else "", speed]))


def interface_to(address: Address, system: Path = Path("/sys/class/net")) -> Interface:
    """This machine's interface that packets to the address leave through."""
    try:
        import psutil  # type: ignore[import-untyped]  # comes with vLLM
    except ModuleNotFoundError:
        return Interface()
    with socket.socket(address.family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(address.sockaddr)  # sends nothing
        except OSError:
            return Interface()
        mine = probe.getsockname()[0].partition("%")[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(known.address.partition("%")[0] == mine for known in addresses):
            return read_interface(name, system)
    return Interface()


def read_interface(name: str, system: Path) -> Interface:
    """What Linux says of it."""
    try:
        mbits = int((system / name / "speed").read_text())
    except (OSError, ValueError):  # Wi-Fi, loopback and virtual ones have none
        mbits = 0
    return Interface(name, (system / name / "wireless").exists(), max(0, mbits))
