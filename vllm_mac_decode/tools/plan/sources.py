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
) -> tuple[Situation, str]:
    """What to plan, and a sentence on where its figures come from. ``given`` is a topology, or
    empty for what was measured: here, and by the ``receiver``, if one answers. By the ``setting``
    codec what is held travelled. Raises ValueError saying what is wrong and what to do."""
    found, said = _situation(model, prompt, output, given, receiver or Shown())
    return (replace(found, held_in=setting) if setting in BITS else found), said


def _situation(
    model: str, prompt: int, output: int, given: str, receiver: Shown
) -> tuple[Situation, str]:
    if given:
        found = topology.load(given).situation(model, prompt, output)
        return found, f"Calculated from the constants of {given}."
    name, layout = models.cache(model)
    vllm, mac = measured("vllm", name), measured("receiver", name)
    if receiver.profile is not None and _is_of(receiver.profile, name):
        mac = receiver.profile
    if vllm is None or mac is None:
        taken = topology.load(topology.DEFAULT).situation(model, prompt, output)
        lacking = " and ".join(
            one for one, side in (("vLLM", vllm), ("the receiver", mac)) if side is None
        )
        return taken, (
            f"No profile of {lacking} with this model is known here, so this is calculated from "
            f"the constants of {topology.DEFAULT}; --topology names another one, and "
            "--receiver-http a receiver that has measured itself."
        )
    link, told = _link(receiver)
    pair = Pair(vllm, mac, link, len(layout.layers), kv_bytes(layout))
    work = Work(prompt, output)
    notes = tuple(topology.too_long(pair, work))
    found = Situation(name, pair, work, Load(), layout, notes)
    return found, f"From both sides' profiles; {told}."


def _link(receiver: Shown) -> tuple[Link, str]:
    """The slowest that vLLMs have measured to it, and in words where it comes from."""
    measured = [path for path in receiver.links.values() if path.rate]
    if not measured:
        return LINKS[_LINK], f"the link is taken to be {_LINK}"
    path = min(measured, key=lambda path: path.rate)
    return Link(path.rate, path.round_trip_ns / 1e9), f"the link as measured to {path.text}"


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
