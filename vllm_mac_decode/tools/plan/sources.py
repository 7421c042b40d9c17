"""Where a plan's figures come from: a topology, or what the two sides have measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mlx_receiver.planning import cached, models, topology
from mlx_receiver.planning.cost import RAW, Codec, Load, Pair, Strategy, Work
from mlx_receiver.planning.hardware import LINKS
from mlx_receiver.planning.shapes import kv_bytes
from mlx_receiver.planning.topology import Situation
from mlx_receiver.wire.profile import Profile
from mlx_receiver.wire.quantised import BITS, CODECS
from vllm_mac_decode.scheduler import codecs
from vllm_mac_decode.scheduler.planner import Planner, Question

#: The link that is taken where profiles are known, which say nothing of it.
_LINK = "10gbe"


def situation(
    model: str, prompt: int, output: int, given: str, setting: str = RAW.name
) -> tuple[Situation, str]:
    """What to plan, and a sentence on where its figures come from. ``given`` is a topology, or
    empty for what was measured here; by the ``setting`` codec what is held travelled. Raises
    ValueError saying what is wrong and what to do."""
    found, said = _situation(model, prompt, output, given)
    return (replace(found, held_in=setting) if setting in BITS else found), said


def _situation(model: str, prompt: int, output: int, given: str) -> tuple[Situation, str]:
    if given:
        found = topology.load(given).situation(model, prompt, output)
        return found, f"Calculated from the constants of {given}."
    name, layout = models.cache(model)
    vllm, mac = measured("vllm", name), measured("receiver", name)
    if vllm is None or mac is None:
        taken = topology.load(topology.DEFAULT).situation(model, prompt, output)
        lacking = " and ".join(
            one for one, side in (("vLLM", vllm), ("the receiver", mac)) if side is None
        )
        return taken, (
            f"No profile of {lacking} with this model is kept on this machine, so this is "
            f"calculated from the constants of {topology.DEFAULT}; --topology names another one."
        )
    pair = Pair(vllm, mac, LINKS[_LINK], len(layout.layers), kv_bytes(layout))
    work = Work(prompt, output)
    notes = tuple(topology.too_long(pair, work))
    found = Situation(name, pair, work, Load(), layout, notes)
    return found, f"From both sides' profiles; the link is taken to be {_LINK}."


def codec(setting: str, wanted: Situation, offered: Sequence[str] = CODECS) -> Codec:
    """How KV is sent where all of it is, by the setting ``codec`` and what the receiver has
    ``offered``: what vLLM's side would decide for the first such request."""
    names = codecs.allowed(setting, offered, wanted.layout)
    ways = [way for way in wanted.codecs if way.name in names]
    asked = Question(wanted.work, wanted.load, wanted.pair, (Strategy.SPLIT,), ways, wanted.held_in)
    return Planner().codec(asked, 0.0)


def measured(side: cached.Side, name: str) -> Profile | None:
    """The latest profile of that side with the model of that name, from wherever it was loaded."""
    for saved in cached.read_all(side):
        if saved.profile.model.rstrip("/").rsplit("/", 1)[-1].lower() == name.lower():
            return saved.profile
    return None
