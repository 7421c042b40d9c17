"""What hand-offs tell of the link, and when it is measured by itself."""

from __future__ import annotations

import itertools

import pytest

from mlx_receiver.planning.cost import RAW, Codec
from vllm_mac_decode.scheduler.throughput import Throughput

MB = 1_000_000
GBIT = 125 * MB


class Wire:
    """A link of a rate, a prefill of a second, and what is said of them."""

    def __init__(self, rate: float = 10 * GBIT) -> None:
        self.now, self.rate, self.number = 0.0, rate, 0
        self.seen = Throughput()
        self.seen.measured(rate, 0.001, 0.0)

    def transfer(self, nbytes: float = 400 * MB, prefill: float = 1.0, codec: Codec = RAW) -> None:
        """One hand-off, alone."""
        self.number += 1
        self.seen.began(self.number, self.now, codec=codec)
        self.seen.computed(self.number, self.now + prefill)
        self.now += max(prefill + 0.01, nbytes * codec.ratio / self.rate, nbytes / codec.encode)
        self.seen.complete(self.number, int(nbytes), self.now)


def near(rate: float) -> object:
    return pytest.approx(rate, rel=0.1)


def test_a_link_that_becomes_slow_is_noticed_within_three_transfers() -> None:
    wire = Wire()
    for _ in range(5):
        wire.transfer()
    assert wire.seen.link.rate == near(10 * GBIT), "hidden transfers say nothing of it"
    for rate in (GBIT, GBIT / 10, GBIT):
        wire.rate = rate
        for _ in range(3):
            wire.transfer()
        assert wire.seen.link.rate == near(rate)


def test_a_transfer_that_was_hidden_proves_that_the_link_is_as_fast() -> None:
    wire = Wire(GBIT / 10)
    wire.rate = 10 * GBIT
    for _ in range(3):
        wire.transfer()
    assert wire.seen.link.rate >= 0.3 * 10 * GBIT * 0.9


def test_transfers_that_share_the_link_say_nothing_alone() -> None:
    wire = Wire()
    for number in range(1, 20, 2):
        began = 10.0 * number
        for session in (number, number + 1):
            wire.seen.began(session, began)
            wire.seen.computed(session, began + 1)
        wire.seen.complete(number, 100 * MB, began + 5)
        wire.seen.complete(number + 1, 100 * MB, began + 8)
    assert wire.seen.link.rate == near(10 * GBIT)


def test_what_has_arrived_tells_while_something_is_under_way_all_the_time() -> None:
    wire = Wire()
    for session in (1, 2):
        wire.seen.began(session, 0.0)
    wire.seen.told(0.5, {1: 5 * MB, 2: 5 * MB}, 0.5)
    wire.seen.told(0.75, {1: 9 * MB, 2: 9 * MB}, 0.75)
    assert wire.seen.link.rate == near(10 * GBIT), "vLLM may not have computed more"
    wire.seen.computed(1, 0.8)
    arrived = 9 * MB
    for number in range(4, 12):
        arrived += int(GBIT / 4 / 2)
        wire.seen.told(number / 4, {1: arrived, 2: arrived}, number / 4)
    assert wire.seen.link.rate == near(GBIT)
    wire.seen.told(5.0, {2: arrived}, 5.0)  # one is gone: what it got at last is not known
    assert wire.seen.link.rate == near(GBIT)
    for session in (1, 2):
        wire.seen.ended(session)
    for number in range(24, 30):
        wire.seen.told(number / 4, {1: arrived, 2: arrived}, number / 4)
    assert wire.seen.link.rate == near(GBIT), "an idle link is not a slow one"


def test_what_is_little_or_impossible_is_ignored() -> None:
    wire = Wire()
    for number in range(9):
        wire.seen.began(number, 1.0)
        wire.seen.computed(number, 1.0)
        wire.seen.complete(number, 1000, 60.0)
        wire.seen.complete(number, 10**9, 90.0)  # not begun
        wire.seen.ended(number)
    wire.seen.measured(0, 0.0, 1.0)
    assert wire.seen.link.rate == near(10 * GBIT)


def test_it_is_measured_again_only_when_it_matters() -> None:
    seen = Throughput()
    seen.measured(GBIT, 0.001, 0.0)
    assert not seen.unsure(100.0), "nobody has used the figure"
    seen.planned(100.0)
    assert seen.unsure(100.0)
    seen.began(1, 100.0)
    assert not seen.unsure(101.0), "blocks are under way"
    seen.ended(1)
    asked = []
    now = 100.0
    while now < 200.0:  # requests go on, and stay local
        if now % 2 == 0:
            seen.planned(now)
        if seen.unsure(now):
            asked.append(now)
            seen.measured(GBIT, 0.001, now)
        now += 0.25
    between = [b - a for a, b in itertools.pairwise(asked)]
    assert 12 <= len(asked) <= 30 and between == sorted(between), "seldom, while it stays so"
    seen.measured(10 * GBIT, 0.001, now)
    seen.planned(now + 1)
    assert not seen.unsure(now + 1) and seen.unsure(now + 1.5), "soon, once it has changed"
    seen.planned(now + 1e6)
    seen.measured(10 * GBIT, 0.001, now + 1e6)
    seen.planned(now + 1e6 + 1)
    assert not seen.unsure(now + 1e6 + 9) and seen.unsure(now + 1e6 + 11)


def test_a_link_that_has_recovered_is_noticed_by_the_second_request() -> None:
    """Those that vLLM keeps take 1.46 s; the link's thread looks four times a second, and measuring
    takes it 0.2 s."""
    for began in range(40):
        seen = Throughput()
        seen.measured(GBIT / 10, 0.001, 0.0)
        now, recovers = 0.0, 20.0 + began / 20
        wrong: list[bool] = []
        while len(wrong) < 30:
            seen.planned(now)
            if now >= recovers:
                wrong.append(seen.link.rate < GBIT)
            until = now + 1.46
            while now < until:
                if seen.unsure(now):
                    now += 0.2
                    seen.measured((10 if now - 0.2 >= recovers else 0.1) * GBIT, 0.001, now)
                now += 0.25
        assert sum(wrong) <= 1, began


def test_bytes_are_told_of_raw_and_the_link_carries_quantised_ones() -> None:
    seen = Throughput()
    seen.measured(GBIT, 0.001, 0.0)
    for number in range(5):
        began = 100.0 * number
        seen.began(number, began, codec=Codec("q8", 0.5))
        seen.computed(number, began + 1)
        for second in range(1, 8):
            seen.told(began + second, {number: 2 * second * GBIT}, began + second)
        seen.complete(number, 16 * GBIT, began + 8)
        seen.told(began + 9, {number: 16 * GBIT}, began + 9)
    assert seen.link.rate == near(GBIT)
    seen.told(1000.0, {}, 1000.0)
    assert not seen._codecs


def coded(rate: float) -> Codec:
    """What both sides do in truth."""
    return Codec("q8", 0.53, rate, rate)


def test_how_fast_both_sides_quantise_is_learnt_where_that_holds_transfers_up() -> None:
    for rate in (0.2e9, 1.1e9):
        wire = Wire(10 * GBIT)
        for _ in range(4):
            wire.transfer(4000 * MB, codec=coded(rate))
        assert wire.seen.codec("q8", 0.53).encode == near(rate)
        assert wire.seen.link.rate == near(10 * GBIT), "the link is no slower for that"
    assert wire.seen.codec("raw", 1.0) == RAW


def test_a_slow_link_is_told_from_slow_quantising() -> None:
    wire = Wire(GBIT)
    for _ in range(4):
        wire.transfer(codec=coded(2e9))
    assert wire.seen.link.rate == near(GBIT)
    assert wire.seen.codec("q8", 0.53).encode == 0.65e9
    wire.rate = GBIT / 4
    for _ in range(4):
        wire.transfer(codec=coded(2e9))
    assert wire.seen.link.rate == near(GBIT / 4)


def test_it_begins_with_what_both_sides_say_and_goes_on_with_what_they_do() -> None:
    wire = Wire(10 * GBIT)
    said = Codec("q8", 0.53, 3e9, 0.2e9)
    assert wire.seen.stated(said).encode == 0.2e9, "the slower one"
    for _ in range(4):
        wire.transfer(4000 * MB, codec=coded(0.5e9))
    assert wire.seen.stated(said).encode == near(0.5e9)
    assert wire.seen.stated(Codec("q8", 0.53, 3e9, 0.21e9)).encode == near(0.5e9), "the same"
    assert wire.seen.stated(Codec("q8", 0.53, 3e9, 1e9)).encode == 1e9, "something else"
    assert wire.seen.stated(RAW) == RAW
    assert wire.seen.codec("q4", 0.28).encode == 0.65e9


@pytest.mark.parametrize("said", [5e-324, 1.0, 1e18])
def test_whatever_both_sides_say_the_link_is_found_when_it_carries_raw_kv(said: float) -> None:
    wire = Wire(GBIT)
    wire.seen.stated(Codec("q8", 0.53, said, said))
    for _ in range(4):
        wire.transfer(4000 * MB, codec=coded(0.2e9))
    for _ in range(4):
        wire.transfer()
    assert wire.seen.link.rate == near(GBIT)


def test_what_was_blamed_on_the_wrong_one_is_put_right() -> None:
    """A fast link becomes slow while KV travels quantised, and fast again."""
    wire = Wire(10 * GBIT)
    wire.rate = GBIT
    for _ in range(4):
        wire.transfer(codec=coded(0.7e9))
    for _ in range(4):
        wire.transfer()
    assert wire.seen.link.rate == near(GBIT)
    wire.rate = 10 * GBIT
    for _ in range(4):
        wire.transfer(4000 * MB, codec=coded(0.7e9))
    assert wire.seen.codec("q8", 0.53).encode == near(0.7e9)
    wire.seen.planned(wire.now + 2)
    assert wire.seen.unsure(wire.now + 2), "quantised KV does not show how fast the link is"
