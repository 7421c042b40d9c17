"""Pairing with a live receiver, and what the machines get that are not paired with it.

A client that comes through the machine's own address on the network is another machine to the
receiver: only loopback is this one.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import zmq

from mlx_receiver.pairing.keystore import Identity, Keystore, PairingError, Peer
from mlx_receiver.pairing.offer import TRIES, new_offer
from mlx_receiver.pairing.visit import card, pair
from mlx_receiver.receiver import Receiver
from mlx_receiver.wire import keys
from mlx_receiver.wire.frames import Header, Kind
from mlx_receiver.wire.messages import Open, Rejected, Welcome
from mlx_receiver.wire.sampling import Sampling
from tests.conftest import own_address
from tests.mlx_receiver.client import FakeVllm, started
from tests.mlx_receiver.conftest import Prefill
from tests.waiting import eventually

GREEDY = Sampling(max_tokens=6, temperature=0.0)


@pytest.fixture(scope="module")
def other() -> str:
    return own_address()


@pytest.fixture(scope="module")
def receiver(tiny_llama_path: Path) -> Iterator[Receiver]:
    """A receiver for every machine, which pairs."""
    with started(tiny_llama_path, host="*", http_port=0, kv_memory=1 << 28) as found:
        yield found


@pytest.fixture
def spark(tmp_path: Path) -> Keystore:
    """Another machine's keys."""
    store = Keystore("vllm")
    store.folder = tmp_path / "spark"
    return store


def http_port(receiver: Receiver) -> int:
    assert receiver.http is not None
    return receiver.http.port


def paired(receiver: Receiver, store: Keystore, host: str) -> Peer:
    code = new_offer(receiver.desk.keystore).shown
    return pair(store, host, receiver.port, http_port(receiver), code)


def known(receiver: Receiver, me: Identity) -> keys.ClientKeys:
    return keys.ClientKeys(receiver.desk.card.key.encode(), me.public.encode(), me.secret.encode())


def client_of(receiver: Receiver, store: Keystore, host: str) -> FakeVllm:
    return FakeVllm(receiver, host=host, known=known(receiver, store.identity()))


def hears_nothing(client: FakeVllm) -> bool:
    try:
        client.hello(seconds=1.0)
    except (AssertionError, zmq.Again):
        return True
    return False


def decodes(client: FakeVllm, prefill: Prefill) -> None:
    kv = prefill(17, decode=6)
    assert [kv.first, *client.tokens(client.request(kv, GREEDY))] == kv.tokens


def test_a_code_opens_the_control_port_for_good(
    receiver: Receiver, spark: Keystore, other: str, prefill: Prefill
) -> None:
    stranger = client_of(receiver, spark, other)
    assert hears_nothing(stranger)
    stranger.close()
    mac = paired(receiver, spark, other)
    assert mac.key == receiver.desk.card.key
    assert [peer.address for peer in spark.peers()] == [f"{other}:{receiver.port}"]
    client = client_of(receiver, spark, other)
    assert isinstance(client.hello(), Welcome)
    decodes(client, prefill)
    client.close()


def test_unpairing_ends_it_at_once_and_nobody_else_notices(
    receiver: Receiver, spark: Keystore, other: str, prefill: Prefill, tmp_path: Path
) -> None:
    second = Keystore("vllm")
    second.folder = tmp_path / "second"
    clients = []
    for store in (spark, second):
        paired(receiver, store, other)
        clients.append(client_of(receiver, store, other))
        assert isinstance(clients[-1].hello(), Welcome)
    # One has a session that waits for its KV.
    clients[0].send(Open(1, "r", [5, 6, 7], GREEDY))
    assert eventually(lambda: len(receiver.store.sessions()) == 1)
    receiver.desk.keystore.remove(spark.identity().instance)
    gone = clients[0].wait(lambda message: isinstance(message, Rejected), 2.0)
    assert "not paired any more" in gone.reason
    assert eventually(lambda: not receiver.store.sessions())
    with pytest.raises(Exception, match=r"closed|broke|does not know"):
        clients[0].connect_data()
    decodes(clients[1], prefill)
    again = client_of(receiver, spark, other)
    assert hears_nothing(again)
    for client in (*clients, again):
        client.close()


def test_this_machine_needs_no_pairing(
    receiver: Receiver, spark: Keystore, prefill: Prefill
) -> None:
    client = client_of(receiver, spark, "127.0.0.1")
    assert isinstance(client.hello(), Welcome)
    decodes(client, prefill)
    client.close()


@pytest.mark.parametrize("token", ["", "guess"])
def test_a_tokens_keys_open_nothing(receiver: Receiver, other: str, token: str) -> None:
    client = FakeVllm(receiver, host=other, token=token)
    assert hears_nothing(client)
    client.close()


def test_wrong_codes_are_counted_and_said(receiver: Receiver, spark: Keystore, other: str) -> None:
    code = new_offer(receiver.desk.keystore).code
    wrong = "00000000" if code != "00000000" else "00000001"
    place = (other, receiver.port, http_port(receiver))
    for _ in range(TRIES):
        with pytest.raises(PairingError, match=r"wrong code.*mlx-receiver pair"):
            pair(spark, *place, wrong)
    with pytest.raises(PairingError, match="shows no code"):
        pair(spark, *place, code)
    with pytest.raises(PairingError, match="8 digits"):
        pair(spark, *place, "123")
    assert spark.peers() == []


def test_a_receiver_with_a_token_pairs_with_nobody(
    tiny_llama_path: Path, spark: Keystore, other: str
) -> None:
    with started(tiny_llama_path, host="*", http_port=0, token="t" * 32) as fixed:
        with pytest.raises(PairingError, match="MAC_DECODE_TOKEN"):
            pair(spark, other, fixed.port, http_port(fixed), "1234-5678")
        with pytest.raises(PairingError, match="MAC_DECODE_TOKEN"):
            card(other, http_port(fixed))  # of its key one could guess the token
        client = FakeVllm(fixed, host=other, token="t" * 32)
        assert isinstance(client.hello(), Welcome)
        client.close()


def test_nobody_there_is_said_with_its_address(spark: Keystore) -> None:
    with pytest.raises(PairingError, match=r"127\.0\.0\.1:9.*--http-port"):
        pair(spark, "127.0.0.1", 7790, 9, "1234-5678")


def test_who_it_is_is_public_and_nothing_else(receiver: Receiver, other: str) -> None:
    assert card(other, http_port(receiver)) == receiver.desk.card
    text = httpx.get(f"http://{other}:{http_port(receiver)}/pair").text
    assert receiver.desk.keystore.identity().secret not in text


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("greeting", b"{", 400),
        ("greeting", b'{"message": ""}', 400),
        ("greeting", b'{"message": "' + b"A" * 9000 + b'"}', 413),
        ("closing", b'{"attempt": "0000000000000000", "card": "QUJD"}', 400),
        ("closing", msgspec.json.encode({"attempt": "0" * 16, "card": bytes(32)}), 403),
        ("closing", b"[" * 5000, 400),
    ],
)
def test_nonsense_is_refused_in_words(
    receiver: Receiver, other: str, path: str, body: bytes, status: int
) -> None:
    answer = httpx.post(
        f"http://{other}:{http_port(receiver)}/pair/{path}",
        content=body,
        headers={"Content-Type": "application/json"},
    )
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]


def test_a_web_page_cannot_pair(receiver: Receiver) -> None:
    url = f"http://127.0.0.1:{http_port(receiver)}/pair/greeting"
    for headers in (
        {"Origin": "http://evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Host": "evil.example"},
        {"Content-Type": "text/plain"},
    ):
        given: dict[str, Any] = {"Content-Type": "application/json"} | headers
        assert httpx.post(url, content=b"{}", headers=given).status_code in (403, 415, 421)


def test_a_stranger_who_says_much_costs_nothing(
    receiver: Receiver, spark: Keystore, other: str, prefill: Prefill
) -> None:
    """Without a pairing not a single message gets in, whatever its size."""
    paired(receiver, spark, other)
    client = client_of(receiver, spark, other)
    assert isinstance(client.hello(), Welcome)
    public, secret = zmq.curve_keypair()
    with zmq.Context() as context:
        strangers = []
        for _ in range(20):
            socket = context.socket(zmq.DEALER)
            socket.setsockopt(zmq.LINGER, 0)
            theirs = keys.ClientKeys(receiver.desk.card.key.encode(), public, secret)
            keys.guard_client(socket, theirs)
            socket.connect(f"tcp://{other}:{receiver.port}")
            with contextlib.suppress(zmq.Again):  # libzmq takes none without a handshake
                socket.send(bytes(1 << 20), zmq.NOBLOCK)
            strangers.append(socket)
        time.sleep(0.5)
        assert not any(socket.poll(0) for socket in strangers)
        assert len(receiver.control.clients) >= 1
        decodes(client, prefill)
        for socket in strangers:
            socket.close()
    client.close()


def test_a_ticket_of_one_client_does_not_reach_anothers_session(
    receiver: Receiver, spark: Keystore, other: str, prefill: Prefill
) -> None:
    paired(receiver, spark, other)
    mine, theirs = (client_of(receiver, spark, other) for _ in range(2))
    for client in (mine, theirs):
        assert isinstance(client.hello(), Welcome)
    kv = prefill(17, decode=6)
    session = mine.request(kv, GREEDY)
    assert theirs.data is not None
    theirs.data.send(Header(kind=Kind.ATTACH, session=session, payload_bytes=0))
    assert [kv.first, *mine.tokens(session)] == kv.tokens
    assert not any(reply.accepted for reply in theirs.data.replies())
    for client in (mine, theirs):
        client.close()
