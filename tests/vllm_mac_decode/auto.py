"""The relay of an engine that knows how fast both sides are."""

from __future__ import annotations

from typing import Any

import msgspec

from mlx_receiver.wire import messages as m
from mlx_receiver.wire.keys import new_ticket
from mlx_receiver.wire.profile import Decode, Prefill, Profile
from tests.vllm_mac_decode.engine import CONTEXT, Engine

#: One that prefills fast and decodes slowly, and the other way round.
VLLM = Profile("v", "m", Prefill(0.0, 1e-3, 0.0, 8192), Decode(0.1, 0.0, 0.0))
MAC = Profile("r", "m", Prefill(0.0, 1.0, 0.0, 2048), Decode(0.02, 0.0, 0.0))


class Auto(Engine):
    """With profiles of both sides."""

    def __init__(self, offload: str = "auto", known: bool = True, **settings: Any) -> None:
        super().__init__(offload=offload, **settings)
        self.lose()
        if known:
            self.relay.profiling.estimate.measured(VLLM)
        welcome = m.Welcome("r", "m", "e", [], new_ticket(), CONTEXT, ["raw"], profile=MAC)
        self.link.up = True
        assert self.receiver.connected(welcome if known else _without(welcome))

    def choose(self, name: str = "a", **params: Any) -> str:
        """What is done with a request, and why."""
        self.add(name, **params)
        (found,) = self.counts().plans
        return str(found)

    def slow(self, rate: float = 100.0) -> None:
        self.link.path = m.DataPath("h", int(rate), 1_000_000)
        self.relay.look(self.receiver, 0.0)


def _without(welcome: m.Welcome) -> m.Welcome:
    return msgspec.structs.replace(welcome, profile=None)
