"""Every phase of a hand-off, and every way from one to the next, without vLLM."""

from __future__ import annotations

import itertools
import random
import time
from typing import Any

import pytest

from mlx_receiver.wire import messages as m
from mlx_receiver.wire.sampling import Sampling
from tests.vllm_mac_decode.engine import BYTES, Engine, Link
from tests.vllm_mac_decode.plain import Output, Params, Request
from vllm_mac_decode.scheduler.handoff import NEXT, Handoff, Phase
from vllm_mac_decode.scheduler.remote import Remote

Way = tuple[Phase, Phase]


@pytest.mark.parametrize(("before", "after"), list(itertools.product(Phase, Phase)))
def test_only_what_the_table_says_follows(before: Phase, after: Phase) -> None:
    handoff = Handoff(1, Request("a", [1], Params(3)), 3, Sampling(3), phase=before)  # type: ignore[arg-type]
    if after in NEXT[before]:
        handoff.enter(after)
        assert handoff.phase is after
    else:
        with pytest.raises(AssertionError, match=f"from {before.name} to {after.name}"):
            handoff.enter(after)
        assert handoff.phase is before


class Drive:
    """An engine, two receivers and clients that do what they may, in an order that nobody chose."""

    def __init__(self, seed: int) -> None:
        self.source = random.Random(seed)
        # Of every other one the receiver does all, unless vLLM is paused.
        self.engine = Engine(offload="mac" if seed % 2 else "always")
        self.relay = self.engine.relay
        self.receivers = [self.engine.receiver, self.engine.join(Link())]
        self.engine.connect(remote=self.receivers[1], name="s")
        self.numbers: dict[str, int] = {}
        self.stepped: set[str] = set()
        self.queued: set[str] = set()  # continuations that vLLM's scheduler has
        self.gone: set[str] = set()  # requests that vLLM's scheduler has no more

    def run(self, events: int) -> None:
        for index in range(events):
            name = self.source.choice([*self.engine.requests, ""])
            match self.source.randrange(16):
                case 0 | 1:
                    self.engine.port.draining = self.source.random() < 0.2
                    routed = self.source.random() < 0.3
                    transfer = {"do_remote_decode": True} if routed else None
                    limit = 1 if routed else self.source.choice([2, 5, 8])
                    self.engine.add(f"r{index}", limit, kv_transfer_params=transfer)
                case 2 | 3 if name in self.engine.taken:
                    self.note(name)
                case 2 | 3 if name and name not in self.gone and name not in self.numbers:
                    self.numbers[name] = self.engine.schedule(name)
                case 4 | 5 if name in self.numbers and name not in self.stepped | self.gone:
                    self.step(name)
                case 6 | 7 | 8 if any(self.numbers.values()):
                    number = self.source.choice(list(self.numbers.values()))
                    by = self.source.choice([self.opener(number), *self.receivers])
                    self.engine.say(self.message(number), by=by)
                case 9 | 10:
                    self.go_on(name)
                case 11 if self.source.random() < 0.3:
                    which = self.source.randrange(2)
                    self.engine.lose(self.receivers[which])
                    if self.source.random() < 0.7:
                        self.engine.connect(remote=self.receivers[which], name="rs"[which])
                case 12 if name in self.engine.taken:
                    self.relay.abort([name])
                case 12 if name and name not in self.gone:
                    self.leave(name)
                case 13 if name in self.numbers:
                    if self.source.random() < 0.5:
                        self.relay.preempted(name)
                    else:
                        self.relay.unreachable([self.numbers[name]])
                case 14 if self.source.random() < 0.2:
                    self.source.choice([self.relay.freeze, self.relay.abort_all])()
                case 15 if self.source.random() < 0.1:
                    self.relay.tick(time.monotonic() + self.source.choice([1.0, 3.0, 90.0]))

    def note(self, name: str) -> None:
        """The number of a session that vLLM's scheduler does not know."""
        handoff = self.relay._by_request.get(name)
        if handoff is not None and name not in self.numbers:
            self.numbers[name] = handoff.session
            self.stepped.add(name)
            self.gone.add(name)

    def step(self, name: str) -> None:
        """Its first token; vLLM decided before the step whether that is the last."""
        self.stepped.add(name)
        request = self.engine.requests[name]
        if request.kv_transfer_params:
            request.output_token_ids.append(7)
            self.relay.prefilled(request)  # type: ignore[arg-type]
            self.engine.put_out(Output(name, [7], "length"))
            self.gone.add(name)
            return
        last = bool(self.numbers[name]) and self.source.random() < 0.9
        finish = self.source.choice(["length", "length", "stop"]) if last else None
        self.engine.put_out(Output(name, [7], finish))
        if finish:
            self.gone.add(name)

    def go_on(self, name: str) -> None:
        """What is left to vLLM goes on: a continuation enters its scheduler, or something ends."""
        local = f"{name}-local"
        again = [one for one in self.engine.port.requeued if one.request_id == name]
        if again and name in self.engine.taken:
            self.engine.taken.remove(name)
            if self.source.random() < 0.2:
                assert self.relay.rejects(name, False) in (True, None)  # vLLM stops
            else:
                given_up = self.relay._by_request[name].given_up
                assert self.relay.on_new_request(again[0]) == given_up  # type: ignore[arg-type]
                assert name not in self.relay._by_request
            return
        if local in self.gone:
            return
        if local in self.queued:
            finish = self.source.choice([None, "stop", "length"])
            if self.source.random() < 0.2:
                self.end(local)
            else:
                self.engine.put_out(Output(local, [9], finish))
        elif any(as_id == local for _, as_id, *_ in self.engine.port.resumed):
            if self.source.random() < 0.3:
                self.end(local)  # vLLM stops
            else:
                self.queued.add(local)
                self.relay.on_new_request(Request(local, [1], Params(3)))  # type: ignore[arg-type]
        elif name in self.stepped and name not in self.gone:
            self.engine.put_out(Output(name, [8], self.source.choice([None, "length"])))

    def leave(self, name: str) -> None:
        """Its client goes away."""
        for known in self.relay.abort([name]):
            self.end(known)

    def end(self, known: str) -> None:
        """vLLM's scheduler ends a request without an output."""
        self.gone.add(known)
        self.relay.aborted(known)

    def opener(self, number: int) -> Remote:
        handoff = self.relay._sessions.get(number)
        return (handoff and handoff.receiver) or self.receivers[0]

    def message(self, number: int) -> m.ReceiverMessage:
        handoff = self.relay._sessions.get(number)
        at = len(handoff.tokens) if handoff is not None else 1
        finish: Any = self.source.choice(["", "", "length"])
        said: list[Any] = [
            m.Opened(number), m.Complete(number, 3 * BYTES), m.Failed(number, "internal", "x"),
            m.Refused(number, "capacity", "x"), m.Complete(number, 0, computed=2),
            *[m.Step([m.Decoded(number, at, [20], finish)])] * 3,
        ]  # fmt: skip
        return self.source.choice(said)


def test_every_way_is_gone_and_nobody_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    ways: set[Way] = set()
    enter = Handoff.enter

    def noted(self: Handoff, phase: Phase) -> None:
        before = self.phase
        enter(self, phase)
        ways.add((before, phase))

    monkeypatch.setattr(Handoff, "enter", noted)
    monkeypatch.setattr("vllm_mac_decode.scheduler.remote.CircuitBreaker.is_open",
                        lambda *_: False)  # fmt: skip
    for seed in range(600):
        drive = Drive(seed)
        drive.run(80)
        for receiver in drive.receivers:
            drive.engine.lose(receiver)
        waiting = {s.request_id for s in drive.relay._sessions.values()}
        for name in waiting:
            assert drive.engine.schedule(name) == 0, "decided, not opened"
        assert not drive.relay._sessions, seed
        left = {handoff.phase for handoff in drive.relay._by_request.values()}
        assert left <= {Phase.LOCAL, Phase.CONTINUING, Phase.CONTINUED}, seed
    assert ways == {(before, after) for before in NEXT for after in NEXT[before]}
