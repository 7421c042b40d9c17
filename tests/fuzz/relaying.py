"""vLLM's side of a hand-off under every order of what an engine, a receiver and time can do."""

from __future__ import annotations

import random
from typing import Any

from mlx_receiver.wire import messages as m
from tests.vllm_mac_decode.engine import BYTES, Engine

EVENTS = 150


def orders(seed: int) -> int:
    """Whatever is said and done in whatever order, each response is given to somebody, and its
    tokens are those that it was given, without a gap."""
    source = random.Random(seed)
    # Of every other one's requests the receiver does all.
    engine = Engine(offload="mac" if seed % 2 else "always")
    numbers: dict[str, int] = {}
    stepped: set[str] = set()

    def message(number: int) -> m.ReceiverMessage:
        count = source.randrange(4)
        session = engine.relay._sessions.get(number)
        at = len(session.tokens) if session is not None else 1
        position = at if source.random() < 0.8 else source.randrange(9)
        finish: Any = source.choice(["", "", "", "length", "stop"])
        said: list[Any] = [
            m.Opened(number), m.Complete(number, 3 * BYTES), m.Complete(number, 3 * BYTES),
            m.Complete(number, 0, computed=source.randrange(5)),
            m.Refused(number, "capacity", "x"), m.Failed(number, "internal", "x"),
            m.Proven(number, source.random() < 0.5, "x"),
            m.Status(0, 0, True, 0, [m.Progress(
                number, source.choice(["receiving", "queued", "decoding"]),
                source.choice([0, source.randrange(3 * BYTES + 2)]), source.randrange(9),
                source.randrange(4))]),
            *[m.Step([m.Decoded(number, position, [20 + i for i in range(count)], finish)])] * 6,
        ]  # fmt: skip
        return source.choice(said)

    for i in range(EVENTS):
        match source.randrange(9):
            case 0:
                name = f"r{i}"
                engine.add(name, max_tokens=source.choice([2, 5, 8]))
                if name in engine.taken:  # vLLM's scheduler does not know it
                    numbers[name] = engine.relay._by_request[name].session
                    stepped.add(name)
            case 1 | 2 if engine.requests:
                name = source.choice(list(engine.requests))
                if name not in stepped:
                    numbers[name] = engine.schedule(name) or numbers.get(name, 0)
            case 3 if engine.requests:
                name = source.choice(list(engine.requests))
                if name not in stepped and name in numbers:
                    stepped.add(name)
                    engine.step(name)
            case 4 if source.random() < 0.2:
                engine.lose()
                engine.connect()
            case _ if numbers:
                engine.say(message(source.choice(list(numbers.values()))))
    engine.lose()
    ended = {name for name, _, finish in engine.port.out if finish}
    resumed = {name: tokens for name, _, tokens, _ in engine.port.resumed}
    again = [request.request_id for request in engine.port.requeued]
    assert len(again) == len(set(again)) and engine.taken.issuperset(again)
    resumed |= {name: [] for name in again}
    for name in stepped:
        # The relay has it, not vLLM alone.
        if engine.tokens(name) or name in ended or name in engine.taken:
            assert (name in ended) != (name in resumed), name
            assert name in ended or engine.tokens(name) == resumed[name]
            assert len(engine.tokens(name)) <= 8
    for name in [session.request_id for session in engine.relay._sessions.values()]:
        assert engine.schedule(name) == 0, "decided, not opened: vLLM's own when its turn comes"
    assert not engine.relay._sessions
    return EVENTS
