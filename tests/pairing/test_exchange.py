"""The exchange of cards, and what somebody without the code gets from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from mlx_receiver.pairing import offer as offers
from mlx_receiver.pairing.exchange import Answer, Closing, Greeting, Guest, Host
from mlx_receiver.pairing.keystore import Keystore, PairingError, Peer
from mlx_receiver.pairing.offer import TRIES, Reception, new_offer, standing

CODE = "12345678"
ATTEMPT = "0" * 16


def a_peer(name: str) -> Peer:
    return Peer(name, zmq.curve_keypair()[0].decode())


SPARK, MAC = a_peer("spark"), a_peer("mac")


def test_both_learn_the_others_card_from_one_code() -> None:
    guest, host = Guest("1234-5678"), Host(CODE)
    answer = host.answer(guest.greeting(), ATTEMPT, MAC)
    assert guest.answered(answer) == MAC
    assert host.closed(guest.closing(ATTEMPT, SPARK)) == SPARK


def test_another_code_opens_neither_card() -> None:
    guest, host = Guest("12345679"), Host(CODE)
    answer = host.answer(guest.greeting(), ATTEMPT, MAC)
    with pytest.raises(PairingError, match="wrong code"):
        guest.answered(answer)
    with pytest.raises(PairingError, match="wrong code"):
        host.closed(guest.closing(ATTEMPT, SPARK))


def test_somebody_in_the_middle_learns_nothing_and_changes_nothing() -> None:
    """Who answers each side without the code has a key with neither."""
    guest, host = Guest(CODE), Host(CODE)
    false_host, false_guest = Host("00000000"), Guest("00000000")
    with pytest.raises(PairingError):
        guest.answered(false_host.answer(guest.greeting(), ATTEMPT, MAC))
    answer = host.answer(false_guest.greeting(), ATTEMPT, MAC)
    assert MAC.key.encode() not in answer.card
    with pytest.raises(PairingError):
        false_guest.answered(answer)


@given(message=st.binary(min_size=1, max_size=64))
def test_any_first_message_is_refused_in_words(message: bytes) -> None:
    with pytest.raises(PairingError):
        Host(CODE).closed(_closing(Host(CODE), message))


def _closing(host: Host, message: bytes) -> Closing:
    answer = host.answer(Greeting(message), ATTEMPT, MAC)
    return Closing(ATTEMPT, answer.card)


def reception() -> tuple[Keystore, Reception]:
    store = Keystore("receiver")
    return store, Reception(store, store.identity(), "mac")


def visit(desk: Reception, code: str) -> Peer:
    guest = Guest(code)
    answer = desk.greet(guest.greeting())
    guest.answered(answer)
    return desk.close(guest.closing(answer.attempt, SPARK))


def test_a_code_pairs_once(state: Path) -> None:
    store, desk = reception()
    code = new_offer(store).shown
    assert visit(desk, code).key == SPARK.key
    assert [peer.key for peer in store.peers()] == [SPARK.key]
    with pytest.raises(PairingError, match="shows no code"):
        visit(desk, code)


def test_three_wrong_codes_end_it(state: Path) -> None:
    store, desk = reception()
    code = new_offer(store).code
    wrong = "00000000" if code != "00000000" else "00000001"
    for _ in range(TRIES):
        with pytest.raises(PairingError, match="wrong code"):
            visit(desk, wrong)
    with pytest.raises(PairingError, match="shows no code"):
        visit(desk, code)
    assert store.peers() == []


def test_the_last_try_may_be_the_right_one(state: Path) -> None:
    store, desk = reception()
    code = new_offer(store).code
    for _ in range(TRIES - 1):
        desk.greet(Guest("00000000").greeting())  # and never heard of again
    assert visit(desk, code).key == SPARK.key


def test_a_wrong_closing_pairs_nobody_and_cannot_be_tried_again(state: Path) -> None:
    store, desk = reception()
    guest = Guest(new_offer(store).code)
    answer = desk.greet(guest.greeting())
    guest.answered(answer)
    with pytest.raises(PairingError, match="wrong code"):
        desk.close(Closing(answer.attempt, bytes(64)))
    with pytest.raises(PairingError, match="begin again"):
        desk.close(guest.closing(answer.attempt, SPARK))
    assert store.peers() == []


def test_a_newer_code_takes_the_place_of_the_older(state: Path) -> None:
    store, desk = reception()
    guest = Guest(new_offer(store).code)
    answer = desk.greet(guest.greeting())
    guest.answered(answer)
    new_offer(store)
    with pytest.raises(PairingError, match="another one is shown"):
        desk.close(guest.closing(answer.attempt, SPARK))
    assert store.peers() == []


def test_a_code_ends_with_its_time(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, desk = reception()
    code = new_offer(store).code
    later = offers.time.time() + offers.OFFER_SECONDS + 1
    monkeypatch.setattr(offers.time, "time", lambda: later)
    assert standing(store) is None
    with pytest.raises(PairingError, match="shows no code"):
        visit(desk, code)


def test_a_recorded_answer_is_of_no_use_for_another_exchange() -> None:
    first, host = Guest(CODE), Host(CODE)
    recorded = host.answer(first.greeting(), ATTEMPT, MAC)
    second = Guest(CODE)
    second.greeting()
    with pytest.raises(PairingError):
        second.answered(Answer(ATTEMPT, recorded.message, recorded.card))
