"""Where a plan's figures come from: a topology, or what the two sides have measured: vLLM's is in a
file of its machine, the receiver says its own and how fast KV comes to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mlx_receiver.planning import cached, models, topology
from mlx_receiver.planning.cost import RAW, Codec, Link, Load, Pair, Strategy, Work
from mlx_receiver.planning.hardware import LINKS
from mlx_receiver.planning.shapes import kv_bytes
from mlx_receiver.planning.shown import Shown
from mlx_receiver.planning.topology import Situation
from mlx_receiver.wire.profile import Profile
from mlx_receiver.wire.quantised import BITS, CODECS
from mlx_receiver.wire.seldom import printable
from vllm_mac_decode.scheduler import codecs
from vllm_mac_decode.scheduler.planner import Planner, Question

#: The link that is taken where both profiles are known, and nobody has measured it.
_LINK = "10gbe"


def situation(
    model: str,
    prompt: int,
    output: int,
    given: str,
    setting: str = RAW.name,
    receiver: Shown | None = None,
    at: str = "",
    streams: int = 1,
) -> tuple[Situation, str]:
    """What to plan, and a sentence on where its figures come from. ``given`` is a topology, or
    empty for what was measured: here, and by the ``receiver`` ``at`` that address, if it answers,
    to which each worker has so many ``streams``. By the ``setting`` codec what is held travelled.
    Raises ValueError saying what is wrong and what to do."""
    if given:
        found = topology.load(given).situation(model, prompt, output)
        said = f"Calculated from the constants of {given}."
    else:
        found, said = _measured(model, prompt, output, receiver, at)
        found = replace(found, streams=streams)
    return (replace(found, held_in=setting) if setting in BITS else found), said


def _measured(
    model: str, prompt: int, output: int, receiver: Shown | None, at: str
) -> tuple[Situation, str]:
    name, layout = models.cache(model)
    own, lacks = _own(receiver, name, at)
    vllm, mac = measured("vllm", name), own or measured("receiver", name)
    if vllm is None or mac is None:
        taken = topology.load(topology.DEFAULT).situation(model, prompt, output)
        lacking = " and ".join(
            one for one, side in (("vLLM", vllm), ("the receiver", mac)) if side is None
        )
        return taken, (
            f"No profile of {lacking} with this model is known here, so this is calculated from "
            f"the constants of {topology.DEFAULT}; --topology names another one, and "
            "--receiver-http a receiver that has measured itself"
            + (f"; {lacks}." if mac is None and at else ".")
        )
    link, told = _link(receiver)
    pair = Pair(vllm, mac, link, len(layout.layers), kv_bytes(layout))
    work = Work(prompt, output)
    notes = tuple(topology.too_long(pair, work))
    found = Situation(name, pair, work, Load(), layout, notes)
    here = f", the receiver's as this machine has kept it: {lacks}" if own is None and at else ""
    return found, f"From both sides' profiles{here}; {told}."


def _own(receiver: Shown | None, name: str, at: str) -> tuple[Profile | None, str]:
    """The receiver's profile of that model, or why it has none."""
    if receiver is None:
        return None, f"no receiver answers at {at}"
    if receiver.profile is None:
        return None, f"the receiver at {at} has not measured itself yet"
    if not _is_of(receiver.profile, name):
        return None, f"the receiver at {at} has {printable(receiver.profile.model)}"
    return receiver.profile, ""


def _link(receiver: Shown | None) -> tuple[Link, str]:
    """The slowest that vLLMs have measured to it, and in words where it comes from."""
    measured = [path for path in receiver.links.values() if path.rate] if receiver else []
    if not measured:
        return LINKS[_LINK], f"the link is taken to be {_LINK}"
    path = min(measured, key=lambda path: path.rate)
    said = f"the link as measured to {printable(path.text)}"
    return Link(path.rate, path.round_trip_ns / 1e9), said


def codec(setting: str, wanted: Situation, offered: Sequence[str] = CODECS) -> Codec:
    """How KV is sent where all of it is, by the setting ``codec`` and what the receiver has
    ``offered``: what vLLM's side would decide for the first such request."""
    names = codecs.allowed(setting, offered, wanted.layout)
    ways = [way for way in wanted.codecs if way.name in names]
    asked = Question(wanted.work, wanted.load, wanted.pair, (Strategy.SPLIT,), ways, wanted.held_in)
    return Planner().codec(asked, 0.0)


def measured(side: cached.Side, name: str) -> Profile | None:
    """The latest profile of that side with the model of that name."""
    for saved in cached.read_all(side):
        if _is_of(saved.profile, name):
            return saved.profile
    return None


def _is_of(profile: Profile, name: str) -> bool:
    """Whether it is that model's, from wherever it was loaded."""
    return profile.model.rstrip("/").rsplit("/", 1)[-1].lower() == name.lower()
