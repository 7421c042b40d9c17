"""Two receivers at one engine: which gets a request, and what becomes of one that is lost."""

from __future__ import annotations

import logging

import pytest

from mlx_receiver.wire import messages as m
from tests.vllm_mac_decode.engine import BYTES, CONTEXT, PROMPT, Engine, Link
from vllm_mac_decode.scheduler.breaker import FAILURES
from vllm_mac_decode.scheduler.remote import Remote


class Two(Engine):
    """The ``receiver`` and an ``other``, both connected."""

    def __init__(self) -> None:
        super().__init__()
        self.beside = Link()
        self.other = self.join(self.beside)
        self.connect(remote=self.other, name="s")

    def opened(self, name: str, *blocks: bytes) -> str:
        """Who was asked for the request's session: "one", "other", or "" for nobody."""
        counts = len(self.link.said), len(self.beside.said)
        self.add(name, block_hashes=list(blocks))
        self.schedule(name)
        if len(self.link.said) > counts[0]:
            return "one"
        return "other" if len(self.beside.said) > counts[1] else ""

    def status(self, remote: Remote, accepting: bool = True, load: int = 0) -> None:
        self.say(m.Status(0, 0, accepting, 0, [], load), by=remote)


@pytest.fixture
def two() -> Two:
    return Two()


def test_each_request_goes_to_the_one_with_the_least_to_do(two: Two) -> None:
    assert [two.opened(f"r{i}") for i in range(4)] == ["one", "other", "one", "other"]
    for request in ("r0", "r2"):
        two.relay.abort([request])
    assert [two.opened(f"s{i}") for i in range(3)] == ["one", "one", "one"]
    # What others have them do counts, too; sessions of this engine are not counted twice.
    two = Two()
    two.status(two.receiver, load=3)
    assert [two.opened(f"r{i}") for i in range(5)] == ["other", "other", "other", "one", "other"]
    own = [m.Progress(s.session, "receiving", 0, 0) for s in two.relay._sessions.values()
           if s.receiver is two.other]  # fmt: skip
    two.say(m.Status(0, 0, True, 0, own, len(own)), by=two.other)
    assert two.other.others == 0


def test_a_conversation_stays_where_it_is(two: Two) -> None:
    """Its receiver holds what was said; how vLLM names the prompt's blocks tells."""
    assert two.opened("a1", b"a", b"b") == "one"
    assert two.opened("b1", b"x") == "other"
    two.relay.abort(["a1", "b1"])
    assert two.opened("b2", b"x", b"y", b"z") == "other"
    assert two.opened("b3", b"x", b"y", b"z", b"0") == "other"
    assert two.opened("a2", b"a", b"b", b"c") == "one"
    assert two.opened("a3", b"a", b"b", b"d") == "one"
    # Not at any price.
    for number in range(4, 9):
        assert two.opened(f"b{number}", b"x", b"y", b"z", b"0", b"1") == "other"
    assert two.opened("b9", b"x", b"y", b"z", b"0", b"1") == "one"
    assert two.opened("c1", b"x", b"y", b"z", b"0", b"1", b"2") == "one"
    two.relay.leave(two.receiver)
    assert two.opened("a4", b"a", b"b", b"c") == "other"


@pytest.mark.parametrize("why", ["full", "context", "breaker", "gone"])
def test_one_that_cannot_take_it_is_passed_over(two: Two, why: str) -> None:
    match why:
        case "full":
            two.status(two.receiver, accepting=False)
        case "context":
            two.lose()
            two.connect(max_tokens=4)
        case "breaker":
            for _ in range(FAILURES):
                two.receiver.failed()
        case "gone":
            two.lose()
    assert [two.opened(f"r{i}") for i in range(3)] == ["other"] * 3
    if why == "full":
        two.status(two.other, accepting=False)
        assert two.opened("x") == ""
        assert two.counts().local == {"receiver_full": 1}


def test_losing_one_moves_its_responses_only(two: Two, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    mine = two.started("a")
    two.add("b")
    theirs = two.schedule("b")
    two.say(m.Opened(theirs), m.Complete(theirs, len(PROMPT) * BYTES), by=two.other)
    two.step("b")
    two.decode(mine, 1, 10)
    two.lose()
    assert two.port.resumed == [("a", "a-local", [7, 10], 8)]
    two.say(m.Step([m.Decoded(theirs, 1, [20])]), by=two.other)
    assert two.tokens("b") == [7, 20], "the other's go on"
    assert two.opened("c") == "other"
    assert two.counts().fallbacks == {"lost": 1}
    two.connect()
    assert two.opened("d") == "one", "it is used again"


def test_a_request_that_waits_goes_to_the_one_that_is_left(two: Two) -> None:
    request = two.add("a")
    two.lose()
    assert two.schedule("a") and isinstance(two.beside.said[-1], m.Open)
    assert request.max_tokens == 1 and not two.counts().local


def test_each_has_a_breaker_of_its_own(two: Two) -> None:
    for index in range(FAILURES):
        number = two.started(f"a{index}")
        two.say(m.Failed(number, "internal", "x"))
    assert [two.opened(f"r{i}") for i in range(2)] == ["other"] * 2
    assert not two.other.local_reason(3) and two.receiver.local_reason(3) == "circuit_open"


def test_what_one_says_of_the_others_session_is_ignored(two: Two) -> None:
    number = two.started("a")
    lies: list[m.ReceiverMessage] = [
        m.Step([m.Decoded(number, 1, [20])]),
        m.Failed(number, "internal", "x"),
        m.Refused(number, "capacity", "x"),
        m.Status(0, 0, True, 0, [m.Progress(number, "decoding", 10**6, 5)]),
    ]
    for lie in lies:
        two.say(lie, by=two.other)
    two.decode(number, 1, 10)
    assert two.tokens("a") == [7, 10] and not two.counts().fallbacks
    cancelled = [s for s in two.link.said if isinstance(s, m.Cancel)]
    two.relay.abort(["a"])
    assert [s for s in two.link.said if isinstance(s, m.Cancel)] != cancelled
    assert not two.beside.said, "and the other hears nothing of it"


def test_one_receiver_is_connected_once(two: Two) -> None:
    """Two of its names lead to it, say."""
    third = two.join(Link())
    assert third.taken("s") and not two.connect(remote=third, name="s")
    assert [two.opened(f"r{i}") for i in range(2)] == ["one", "other"]
    two.lose(two.other)
    assert not third.taken("s") and two.connect(remote=third, name="s")


def test_one_that_is_gone_for_good_is_forgotten(two: Two) -> None:
    number = two.started("a")
    two.decode(number, 1, 10)
    two.relay.leave(two.receiver)
    assert two.port.resumed == [("a", "a-local", [7, 10], 8)]
    assert two.opened("b") == "other"
    waiting = two.add("w")
    two.relay.close()
    assert waiting.max_tokens == 8, "nobody will ask again before it is prefilled"
    assert two.opened("c") == ""
    assert not two.connect(), "one that was still connecting comes too late"
    assert two.opened("d") == ""
    two.counts()
    assert two.opened("e") == ""
    assert two.counts().local == {"no_receiver": 1}


def test_contexts_may_differ(two: Two) -> None:
    two.lose(two.other)
    two.connect(max_tokens=CONTEXT + 1000, remote=two.other, name="s")
    prompt = list(range(1, CONTEXT + 2))
    two.add("long", prompt=prompt)
    assert two.schedule("long") and isinstance(two.beside.said[-1], m.Open)
