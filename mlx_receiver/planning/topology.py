"""Which machines, connected how: a name, or a file that describes hardware that need not be there.

A file in TOML::

    [prefill]               # vLLM's side
    device = "spark"
    count = 2
    tokens = 4096           # of the prompt, that it has cached

    [decode]                # the receiver's
    device = "m3-ultra"
    bits = 4.5              # of a number of its weights
    q8 = 1.1e9              # bytes of raw KV that one thread decodes in a second
    batch = 2               # texts that it decodes besides

    [link]
    name = "10gbe"
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from mlx_receiver.planning import models
from mlx_receiver.planning.coding import codec
from mlx_receiver.planning.cost import RAW, Codec, Link, Load, Pair, Prediction, Strategy, Work
from mlx_receiver.planning.hardware import DEVICES, LINKS, USABLE, Device
from mlx_receiver.planning.shapes import kv_bytes
from mlx_receiver.wire.layout import CacheLayout
from mlx_receiver.wire.profile import Coding, Profile
from mlx_receiver.wire.quantised import BITS, ratio
from mlx_receiver.wire.seldom import printable

#: What is taken where nothing is said: the set-up of the published demo.
DEFAULT: Final = "spark+m3-ultra@10gbe"

_Rate = Annotated[float, Meta(ge=1, le=1e18)]
_Share = Annotated[float, Meta(ge=1e-6, le=1)]
_Seconds = Annotated[float, Meta(ge=0, le=1e6)]
_Count = Annotated[int, Meta(ge=0, le=1 << 20)]
_Positive = Annotated[int, Meta(ge=1, le=1 << 20)]
_Threads = Annotated[int, Meta(ge=1, le=4096)]


class Side(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[prefill]`` or ``[decode]``. ``device`` is one of ``hardware.DEVICES``; what is given
    besides takes the place of what is known of it (``hardware.Device``; ``memory`` in bytes).

    ``bits`` is those of a number of the weights, ``tokens`` of the prompt are in the side's cache,
    ``batch`` texts are decoded besides, and ``wait`` seconds pass before it can begin. ``q8`` and
    ``q4`` are the bytes of raw KV that one thread quantises or decodes in a second, ``threads`` how
    many times as fast all of them are (``wire.profile.Coding``): on the prefill side one for each
    machine where nothing is said, on the other one for each connection.
    """

    device: str
    count: Annotated[int, Meta(ge=1, le=64)] = 1
    flops: _Rate | None = None
    bandwidth: _Rate | None = None
    memory: _Rate | None = None
    matrices: _Share | None = None
    attention: _Share | None = None
    experts: _Share | None = None
    reads: _Share | None = None
    passes: _Share | None = None
    routing: _Seconds | None = None
    chunk: _Positive | None = None
    peers: _Rate | None = None
    bits: Annotated[float, Meta(ge=1, le=64)] | None = None
    tokens: _Count = 0
    batch: _Count = 0
    wait: _Seconds = 0.0
    q8: _Rate | None = None
    q4: _Rate | None = None
    threads: _Threads | None = None

    def profile(self, model: models.Model, threads: int) -> Profile:
        """How fast it is. Raises ValueError saying why that is not known."""
        coding = Coding(self.q8 or 0.0, self.q4 or 0.0, self.threads or threads)
        return msgspec.structs.replace(self.machine().profile(model, self.count), coding=coding)

    def machine(self) -> Device:
        """Raises ValueError naming the machines that are known."""
        device = DEVICES.get(self.device)
        if device is None:
            known = ", ".join(DEVICES)
            raise ValueError(
                f"no device {self.device!r} is known: take one of {known}, the nearest, and give "
                "its flops, bandwidth and memory beside it"
            )
        fields = (
            "flops", "bandwidth", "memory", "matrices", "attention", "experts", "reads", "passes",
            "routing", "chunk", "peers",
        )  # fmt: skip
        given = {name: value for name in fields if (value := getattr(self, name)) is not None}
        return replace(device, **given)


class Wire(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[link]``: one of ``hardware.LINKS``, or bytes a second; a ``round_trip`` in seconds,
    bytes of others that go first, and the connections of each machine that prefills."""

    name: str | None = None
    rate: Annotated[float, Meta(ge=0, le=1e18)] | None = None
    round_trip: _Seconds | None = None
    queued: Annotated[float, Meta(ge=0, le=1e18)] = 0.0
    streams: Annotated[int, Meta(ge=1, le=64)] = 1

    def link(self) -> Link:
        """Raises ValueError naming the links that are known."""
        link = LINKS.get(self.name or "")
        if link is None:
            if self.name is not None or self.rate is None:
                given = f"no link {self.name!r} is known" if self.name else "[link] has no name"
                raise ValueError(f"{given}: take one of {', '.join(LINKS)}, or give a rate")
            link = Link(self.rate)
        rate = link.rate if self.rate is None else self.rate
        return Link(rate, link.round_trip if self.round_trip is None else self.round_trip)


class Topology(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Two sides and a link."""

    prefill: Side
    decode: Side
    link: Wire

    def situation(self, model: str, prompt: int, output: int) -> Situation:
        """Of a request for that model. Raises ValueError saying what is wrong."""
        ours, theirs = (models.find(model, side.bits) for side in (self.prefill, self.decode))
        pair = Pair(
            vllm=self.prefill.profile(ours, self.prefill.count),
            mac=self.decode.profile(theirs, self.prefill.count * self.link.streams),
            link=self.link.link(),
            layers=ours.layers,
            kv_bytes=kv_bytes(ours.layout),
        )
        notes = [
            note
            for side, one in ((self.prefill, ours), (self.decode, theirs))
            if (note := _too_large(side, one))
        ]
        work = Work(prompt, output, self.prefill.tokens, self.decode.tokens)
        notes += too_long(pair, work)
        load = Load(
            self.prefill.wait, self.prefill.batch, self.decode.wait, self.decode.batch,
            self.link.queued,
        )  # fmt: skip
        return Situation(ours.name, pair, work, load, ours.layout, tuple(notes), self.link.streams)


@dataclass(frozen=True, slots=True)
class Situation:
    """What a plan is made for: ``layout`` is the model's cache, ``notes`` what speaks against it,
    ``streams`` the connections of each of vLLM's workers, ``held_in`` how what the receiver holds
    of the prompt travelled: it is a beginning for the same only."""

    model: str
    pair: Pair
    work: Work
    load: Load
    layout: CacheLayout
    notes: tuple[str, ...] = ()
    streams: int = 1
    held_in: str = RAW.name

    @property
    def meets(self) -> bool:
        """Whether the cache can come from both machines."""
        return self.layout.every_token

    @property
    def codecs(self) -> tuple[Codec, ...]:
        """How KV can travel, what loses least first."""
        coding = self.pair.vllm.coding, self.pair.mac.coding
        names = [name for name in BITS if ratio(self.layout, name) < 1]
        return RAW, *(
            codec(name, ratio(self.layout, name), *coding, self.streams) for name in names
        )

    def predict(self, strategy: Strategy, way: Codec = RAW) -> Prediction:
        """Of a request whose KV travels so."""
        held = self.work.held if way.name == self.held_in else 0
        return self.pair.predict(strategy, replace(self.work, held=held), self.load, way)


def load(given: str) -> Topology:
    """The topology of a name like ``spark+m3-ultra@10gbe`` (``2xspark`` for two), or of a file.

    Raises ValueError saying what is wrong and what to do.
    """
    try:
        path = Path(given).expanduser()
        is_path = path.suffix == ".toml" or path.is_file()
    except (OSError, RuntimeError):  # no path at all: too long, or the home of nobody
        is_path = False
    if is_path:
        return _read(path)
    sides, at, link = given.partition("@")
    prefill, plus, decode = sides.partition("+")
    if not (prefill and plus and decode and at and link):
        raise ValueError(
            f"no topology {given}: give a file.toml, or PREFILL+DECODE@LINK, as in {DEFAULT}. "
            f"Devices: {', '.join(DEVICES)}; links: {', '.join(LINKS)}"
        )
    topology = Topology(_side(prefill), _side(decode), Wire(link))
    _check(topology)
    return topology


def _read(path: Path) -> Topology:
    try:
        topology = msgspec.toml.decode(path.read_bytes(), type=Topology)
        _check(topology)
    except (OSError, ValueError) as error:  # msgspec's are ValueErrors
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{path}: {reason}") from None
    return topology


def _check(topology: Topology) -> None:
    for side in (topology.prefill, topology.decode):
        side.machine()
    topology.link.link()


def _side(text: str) -> Side:
    count, times, device = text.partition("x")
    if times and count.isdecimal():
        try:
            return msgspec.convert({"device": device, "count": int(count)}, Side)
        except ValueError as error:  # msgspec's are
            raise ValueError(f"{text}: {error}") from None
    return Side(text)


def too_long(pair: Pair, work: Work) -> list[str]:
    """What to say of each side whose memory cannot hold the request's cache, if that is known."""
    length = work.prompt + work.output
    needed = pair.kv_bytes(0, length)
    return [
        f"the KV of {length:,} tokens takes {needed / 1e9:.0f} GB, and {printable(side.device)} "
        f"has some {side.kv_bytes / 1e9:.0f} GB for it"
        for side in (pair.vllm, pair.mac)
        if 0 < side.kv_bytes < needed
    ]


def _too_large(side: Side, model: models.Model) -> str:
    machine = side.machine()
    memory = side.count * machine.memory * USABLE
    if model.nbytes <= memory:
        return ""
    return (
        f"{model.name}'s weights take {model.nbytes / 1e9:.0f} GB, and {side.count} x "
        f"{machine.title} has some {memory / 1e9:.0f} GB for them: give fewer bits or another count"
    )
