"""What both sides say of how fast they quantise, as plans count it."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_receiver.planning.coding import ASSUMED, codec, of_workers
from mlx_receiver.planning.cost import Link
from mlx_receiver.planning.live import alike
from mlx_receiver.wire import messages as m
from mlx_receiver.wire import trust
from mlx_receiver.wire.codec import decode_receiver
from mlx_receiver.wire.profile import Coding, Decode, Prefill, Profile

NOTHING = Coding()


def test_what_nobody_says_is_taken_to_be_a_core_s() -> None:
    for name, rate in ASSUMED.items():
        found = codec(name, 0.5, NOTHING, NOTHING)
        assert (found.encode, found.decode) == (rate, rate)
    found = codec("q8", 0.5, Coding(q8=3e9), NOTHING)
    assert (found.encode, found.decode) == (3e9, ASSUMED["q8"])
    assert codec("raw", 1.0, Coding(1.0, 1.0), Coding(1.0, 1.0)).encode == math.inf


@pytest.mark.parametrize(
    ("workers", "streams", "threads", "encode", "decode"),
    [
        (1, 1, 8, 2e9, 1e9),
        (1, 2, 8, 2e9, 2e9),  # one thread quantises, for both connections
        (4, 1, 8, 8e9, 4e9),
        (4, 2, 8, 8e9, 8e9),
        (4, 2, 3, 8e9, 3e9),  # no more than the receiver's cores
        (1, 1, 1.5, 2e9, 1e9),
    ],
)
def test_each_worker_quantises_and_each_connection_decodes(
    workers: int, streams: int, threads: float, encode: float, decode: float
) -> None:
    found = codec("q8", 0.5, Coding(2e9, 1.0, workers), Coding(1e9, 1.0, threads), streams)
    assert (found.encode, found.decode) == (encode, decode)


def test_workers_together_are_done_when_the_last_one_is() -> None:
    alone = of_workers([(100, {"q8": 2e9, "q4": 1e9})])
    assert alone == Coding(2e9, 1e9, 1)
    two = of_workers([(100, {"q8": 2e9, "q4": 1e9}), (100, {"q8": 3e9, "q4": 0.5e9})])
    assert (two.q8 * two.threads, two.q4 * two.threads) == (4e9, 1e9)
    # Of three quarters of a prompt's bytes the one that has them makes a third of these a second.
    uneven = of_workers([(300, {"q8": 1e9}), (100, {"q8": 1e9})])
    assert uneven.q8 * uneven.threads == pytest.approx(4 / 3 * 1e9)
    assert uneven.q4 == 0.0


def test_workers_that_say_nothing() -> None:
    assert of_workers([]) == of_workers([(0, {})]) == NOTHING
    assert of_workers([(100, {})]).q8 == 0.0
    assert of_workers([(100, {"q8": 2e9}), (100, {})]).q8 == 0.0, "nobody knows of the other"
    assert of_workers([(100, {"q8": 2e9}), (0, {})]).q8 == 2e9, "it sends nothing"


_ANY = st.builds(
    Coding, st.floats(0, 1e18), st.floats(0, 1e18), st.floats(1, 65536)
)  # what the wire lets pass


@given(_ANY, _ANY, st.integers(1, 64), st.sampled_from(["q8", "q4"]), st.floats(0, 1e18))
def test_whatever_is_said_predictions_are_finite(
    vllm: Coding, mac: Coding, streams: int, name: str, rate: float
) -> None:
    found = codec(name, 0.53, vllm, mac, streams)
    assert found.encode > 0 and found.decode > 0
    assert 0 < found.seconds(1e9, Link(rate)) <= 1e9


ONE = Profile("r", "m", Prefill(0, 1, 0, 9), Decode(1, 0, 0), coding=Coding(1e9, 1e9, 4.0))


@pytest.mark.parametrize(
    "said",
    [
        {"q8": math.nan}, {"q8": math.inf}, {"q4": -1.0}, {"q8": 1e19}, {"q8": "fast"},
        {"threads": 0.5}, {"threads": math.nan}, {"threads": 1e9},
    ],
)  # fmt: skip
def test_rates_that_are_none_are_no_message(said: dict[str, Any]) -> None:
    message = msgspec.to_builtins(m.Status(0, 0, True, 0, [], profile=ONE))

    def hear() -> None:
        trust.check(decode_receiver(msgspec.msgpack.encode(message)), 100)

    hear()
    message["profile"]["coding"] |= said
    with pytest.raises(m.WireError):
        hear()


def test_older_sides_say_nothing_of_it_and_hear_it() -> None:
    message = msgspec.to_builtins(ONE)
    del message["coding"]
    old = msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=Profile)
    assert old.coding == NOTHING and old.decode == ONE.decode

    class Before(msgspec.Struct, frozen=True):
        device: str
        model: str

    assert msgspec.msgpack.decode(msgspec.msgpack.encode(ONE), type=Before) == Before("r", "m")


def test_others_hear_of_rates_that_change() -> None:
    one = ONE

    def changed(**rates: float) -> Profile:
        return Profile(
            "r", "m", one.prefill, one.decode,
            coding=Coding(**{"q8": 1e9, "q4": 1e9, "threads": 4.0} | rates),
        )  # fmt: skip

    assert alike(one, changed(q8=1.1e9)) and not alike(one, changed(q8=2e9))
    assert not alike(one, changed(q4=0.0)) and not alike(one, changed(threads=2.0))
