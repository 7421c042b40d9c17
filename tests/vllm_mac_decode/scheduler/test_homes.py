"""What a receiver is taken to hold of a prompt."""

from __future__ import annotations

from typing import Any, cast

from tests.vllm_mac_decode.plain import Params, Request
from vllm_mac_decode.scheduler.homes import Homes
from vllm_mac_decode.scheduler.remote import Remote

SIZE = 16
ONE, OTHER = (cast(Remote, object()) for _ in range(2))


def request(tokens: int, *, of: str = "", upto: int = 0) -> Any:
    """A prompt of its own after its first ``upto`` tokens, which all have."""
    own = of or str(tokens)
    blocks = [("all" if end <= upto else own, end) for end in range(SIZE, tokens + 1, SIZE)]
    return Request("a", [0] * tokens, Params(1), block_hashes=blocks)


def test_a_conversation_goes_on_where_it_ended() -> None:
    homes = Homes()
    home = homes.sent(request(100, of="a"), ONE)
    assert homes.held(request(300, of="a"), ONE) == 100
    home.tokens = 140
    assert homes.held(request(300, of="a"), ONE) == 140
    assert homes.held(request(120, of="a"), ONE) == 120
    assert homes.held(request(300, of="a"), OTHER) == 0
    assert homes.held(request(300, of="b"), ONE) == 0
    assert homes.of(request(300, of="a")) is ONE


def test_prompts_branch_off() -> None:
    """What was not sent to its end counts for what there is of it."""
    homes = Homes()
    home = homes.sent(request(3200, of="a", upto=1600), ONE)
    found = homes.held(request(3000, of="b", upto=1600), ONE)
    assert 1600 - 4 * SIZE <= found <= 1600
    assert homes.of(request(3000, of="b", upto=1600)) is None
    home.tokens = 500
    assert homes.held(request(3000, of="b", upto=1600), ONE) == 500
    homes.sent(request(3200, of="c", upto=1600), OTHER)
    assert homes.held(request(3000, of="b", upto=1600), OTHER) == found


def test_a_block_is_never_taken_for_a_longer_one() -> None:
    """What is behind a prompt's last block is no part of it."""
    homes = Homes()
    homes.sent(request(31, of="a"), ONE)
    longer = request(200, of="a", upto=16)
    longer.block_hashes[0] = request(31, of="a").block_hashes[0]
    homes._ends.clear()
    assert homes.held(longer, ONE) == SIZE
    for tokens in (100, 47, 1000, 33, 3200):
        homes.sent(request(tokens, of=str(tokens), upto=16), ONE)
        assert homes._block <= SIZE
    assert homes._block == SIZE


def test_what_travelled_in_a_codec_is_held_for_that_one() -> None:
    homes = Homes()
    homes.sent(request(100, of="a"), ONE, "q8")
    assert homes.find(request(300, of="a"), ONE) == (100, "q8")
    assert homes.held(request(300, of="a"), ONE) == 0
    assert homes.held(request(300, of="a"), ONE, "q8") == 100
    homes.sent(request(200, of="a"), ONE)
    assert homes.find(request(300, of="a"), ONE) == (200, "raw"), "the latest"


def test_without_hashes_nothing_is_known() -> None:
    homes = Homes()
    homes.sent(Request("a", [0] * 100, Params(1)), ONE)  # type: ignore[arg-type]
    assert homes.held(Request("a", [0] * 100, Params(1)), ONE) == 0  # type: ignore[arg-type]


def test_memory_is_bounded_and_the_latest_stay() -> None:
    homes = Homes()
    for number in range(6000):
        homes.sent(request(1600, of=str(number)), ONE)
    assert len(homes._ends) == 4096 and len(homes._beginnings) == 32768
    assert homes.held(request(1700, of="5999"), ONE) == 1600
    assert homes.held(request(1700, of="0"), ONE) == 0
    homes.leave(ONE)
    assert not homes._ends and not homes._beginnings


def test_long_prompts_take_little() -> None:
    homes = Homes()
    homes.sent(request(160_000), ONE)
    assert len(homes._beginnings) <= 128
