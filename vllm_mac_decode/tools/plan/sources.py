"""Where a plan's figures come from: a topology, or what the two sides have measured."""

from __future__ import annotations

from mlx_receiver.planning import cached, models, topology
from mlx_receiver.planning.cost import Load, Pair, Work
from mlx_receiver.planning.hardware import LINKS
from mlx_receiver.planning.shapes import kv_bytes
from mlx_receiver.planning.topology import Situation
from mlx_receiver.wire.profile import Profile

#: The link that is taken where profiles are known, which say nothing of it.
_LINK = "10gbe"


def situation(model: str, prompt: int, output: int, given: str) -> tuple[Situation, str]:
    """What to plan, and a sentence on where its figures come from. ``given`` is a topology, or
    empty for what was measured here. Raises ValueError saying what is wrong and what to do."""
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
    found = Situation(name, pair, work, Load(), layout.every_token, notes)
    return found, f"From both sides' profiles; the link is taken to be {_LINK}."


def measured(side: cached.Side, name: str) -> Profile | None:
    """The latest profile of that side with the model of that name, from wherever it was loaded."""
    for saved in cached.read_all(side):
        if saved.profile.model.rstrip("/").rsplit("/", 1)[-1].lower() == name.lower():
            return saved.profile
    return None
