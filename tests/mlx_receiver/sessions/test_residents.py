"""Of a prompt that begins like an earlier text only the rest comes, and decodes as if all had."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from mlx_receiver.decode.local import LocalJob
from mlx_receiver.receiver import Receiver
from mlx_receiver.wire.messages import Opened
from mlx_receiver.wire.sampling import Sampling
from tests.mlx_receiver.client import FakeVllm, Prefilled, block, connected, started
from tests.mlx_receiver.conftest import Prefill
from tests.waiting import eventually

LAYERS, HEADS = 4, 2
WEIGHTS = "a fingerprint"
GREEDY = Sampling(max_tokens=8, temperature=0.0)


@pytest.fixture
def client(keeping: Receiver) -> Iterator[FakeVllm]:
    empty(keeping)
    with connected(keeping, weights=WEIGHTS) as found:
        yield found


def empty(receiver: Receiver) -> None:
    """A response is complete a moment before its cache is kept."""
    assert eventually(lambda: not receiver.store.sessions() and not receiver.store.reserved_bytes)
    while receiver.store.residents.reclaim():
        pass
    assert receiver.store.budget.reserved == 0


def held(client: FakeVllm, session: int) -> int:
    opened = client.opened(session)
    assert isinstance(opened, Opened), opened
    return opened.held.tokens


def send_rest(client: FakeVllm, session: int, kv: Prefilled, start: int) -> None:
    """What is not there yet."""
    assert client.data is not None
    for layer in range(LAYERS) if start < len(kv.prompt) else ():
        for plane in range(2):
            rows = slice(start, len(kv.prompt))
            header, payload = block(session, kv, layer, plane, slice(0, HEADS), rows)
            client.data.send(header, [payload])


def turn(
    client: FakeVllm, kv: Prefilled, sampling: Sampling = GREEDY, **changes: Any
) -> tuple[int, list[int]]:
    """A hand-off; how many tokens were there, and the whole answer."""
    session = client.open(kv.prompt, sampling, changes)
    start = held(client, session)
    send_rest(client, session, kv, start)
    client.start(session, kv.first)
    complete = client.complete(session)
    assert complete.kv_bytes == 2 * LAYERS * HEADS * 32 * 4 * (len(kv.prompt) - start)
    return start, [kv.first, *client.tokens(session)]


def settled(client: FakeVllm) -> None:
    """What the responses leave is kept."""
    store = client.receiver.store
    assert eventually(lambda: not store.sessions() and store.reserved_bytes == 0)


def followed(kv: Prefilled, answer: list[int], *more: int) -> tuple[int, ...]:
    return (*kv.prompt, *answer, *more)


@pytest.mark.parametrize("first", [17, 200, 256, 300])
def test_turns_of_a_conversation(client: FakeVllm, prefill: Prefill, first: int) -> None:
    kv, there = prefill(first), 0
    for number in range(5):
        start, answer = turn(client, kv)
        assert answer == kv.tokens
        assert start == there
        settled(client)
        there = len(kv.prompt) + len(answer)  # the last token's K and V, too
        kv = prefill(followed(kv, answer, *range(50 + number, 60 + 20 * number)))
    assert len(client.receiver.store.residents) == 1  # each turn's holds those before


def test_turns_without_a_pause(client: FakeVllm, prefill: Prefill) -> None:
    """A response is complete a moment before its cache is kept."""
    kv, there = prefill(100), 0
    for number in range(6):
        assert turn(client, kv) == (there, kv.tokens)
        there = len(kv.prompt) + 8
        kv = prefill(followed(kv, kv.tokens, 30 + number, 31))


def test_a_conversation_that_outgrows_its_memory(client: FakeVllm, prefill: Prefill) -> None:
    """The second turn is written behind the first one in its own memory; decoding needs more."""
    kv = prefill(30)
    turn(client, kv)
    settled(client)
    kv = prefill(followed(kv, kv.tokens, 77), decode=700)
    start, answer = turn(client, kv, msgspec.structs.replace(GREEDY, max_tokens=700))
    assert (start, answer) == (38, kv.tokens)


def test_a_copy_has_room_for_the_turns_after_it(client: FakeVllm, prefill: Prefill) -> None:
    """A turn that is longer than the room behind the earlier text copies it; the next does not."""
    kv = prefill(300)
    turn(client, kv)
    settled(client)
    for more, alone in ((600, False), (150, True)):
        kv = prefill(followed(kv, kv.tokens, *range(1000, 1000 + more)))
        session = client.open(kv.prompt, GREEDY)
        start = held(client, session)
        assert client.receiver.store.get(session).beginning.alone is alone
        send_rest(client, session, kv, start)
        client.start(session, kv.first)
        assert [kv.first, *client.tokens(session)] == kv.tokens
        settled(client)


def test_an_edited_answer(client: FakeVllm, prefill: Prefill) -> None:
    kv = prefill(120, decode=40)
    sampling = msgspec.structs.replace(GREEDY, max_tokens=40)
    turn(client, kv, sampling)
    settled(client)
    edited = prefill((*kv.prompt, *kv.tokens[:5], *range(700, 730)))
    start, answer = turn(client, edited)
    assert (start, answer) == (125, edited.tokens)
    settled(client)
    # The first answer is still there, and so is the other branch.
    for branch, tokens in ((kv, kv.tokens), (edited, edited.tokens)):
        again = prefill(followed(branch, tokens, 4, 5))
        assert turn(client, again) == (len(branch.prompt) + len(tokens), again.tokens)
        settled(client)


def test_the_same_prompt_again(client: FakeVllm, prefill: Prefill) -> None:
    """Nothing is left to be sent."""
    kv = prefill(150)
    assert turn(client, kv)[0] == 0
    settled(client)
    for _ in range(5):
        # Its first token is there before it is copied, so that it is decoded by then.
        session = client.open(kv.prompt, GREEDY)
        client.start(session, kv.first)
        assert held(client, session) == 150
        assert [kv.first, *client.tokens(session)] == kv.tokens
        settled(client)
    empty(client.receiver)


def test_several_branches_at_once(client: FakeVllm, prefill: Prefill) -> None:
    base = prefill(300)
    turn(client, base)
    settled(client)
    branches = [prefill(followed(base, base.tokens, 60 + n, 7 * n, 9)) for n in range(4)]
    sessions = [client.open(kv.prompt, GREEDY) for kv in branches]
    assert [held(client, session) for session in sessions] == [308] * 4
    for session, kv in zip(sessions, branches, strict=True):
        send_rest(client, session, kv, 308)
        client.start(session, kv.first)
    for session, kv in zip(sessions, branches, strict=True):
        assert [kv.first, *client.tokens(session)] == kv.tokens
    settled(client)


@pytest.mark.parametrize("after", [0, 3])
def test_an_aborted_response_leaves_its_tokens(
    client: FakeVllm, prefill: Prefill, after: int
) -> None:
    kv = prefill(90, decode=30)
    session = client.open(kv.prompt, msgspec.structs.replace(GREEDY, max_tokens=2000))
    client.opened(session)
    client.send_kv(session, kv)
    client.start(session, kv.first)
    steps = client.steps(session)
    for _ in range(after + 1):
        next(steps)
    client.cancel(session)
    settled(client)
    again = prefill((*kv.prompt, *kv.tokens[: after + 1], 5, 6))
    assert turn(client, again) == (91 + after, again.tokens)


def test_a_turn_that_is_given_up_harms_nothing(client: FakeVllm, prefill: Prefill) -> None:
    """It wrote behind the earlier text, into that one's memory."""
    kv = prefill(60)
    turn(client, kv)
    settled(client)
    wrong = prefill(followed(kv, kv.tokens, *range(400, 420)))
    session = client.open(wrong.prompt, GREEDY)
    assert held(client, session) == 68
    assert client.receiver.store.get(session).beginning.alone
    assert client.data is not None
    header, payload = block(session, wrong, 0, 0, slice(0, HEADS), slice(68, 80))
    client.data.send(header, [payload])
    client.cancel(session)
    settled(client)
    right = prefill(followed(kv, kv.tokens, 1, 2, 3))
    assert turn(client, right) == (68, right.tokens)


def test_a_row_that_is_there_may_come_again_but_not_another(
    client: FakeVllm, prefill: Prefill
) -> None:
    kv = prefill(60)
    turn(client, kv)
    settled(client)
    more = prefill(followed(kv, kv.tokens, 1, 2, 3))
    session = client.open(more.prompt, GREEDY)
    assert held(client, session) == 68
    assert client.data is not None
    same = block(session, kv, 1, 1, slice(0, HEADS), slice(10, 20))
    client.data.send(same[0], [same[1]])
    other = np.array(more.planes[1][1], copy=True)
    other[1, 15] ^= 1
    more.planes[1][1], right = other, more.planes[1][1]
    try:
        header, payload = block(session, more, 1, 1, slice(0, HEADS), slice(10, 20))
        client.data.send(header, [payload])
        assert "head 1, token 15" in client.failed(session).reason
    finally:
        more.planes[1][1] = right
    settled(client)
    assert turn(client, more)[1] == more.tokens


def test_texts_of_others_are_not_found(client: FakeVllm, prefill: Prefill) -> None:
    kv = prefill(80)
    turn(client, kv)
    settled(client)
    again = prefill(followed(kv, kv.tokens, 5))
    assert turn(client, again, salt="another")[0] == 0
    settled(client)
    with connected(client.receiver, weights=WEIGHTS) as other:
        assert turn(other, again)[0] == 88  # the same machine, connected once more
    settled(client)
    other = FakeVllm(client.receiver)
    try:
        other.hello(fingerprint="other weights")
        assert turn(other, again)[0] == 0
    finally:
        other.close()
    with connected(client.receiver) as unknown:  # not even its own of another connection
        assert turn(unknown, again)[0] == 0
    settled(client)
    with connected(client.receiver) as unknown:
        assert turn(unknown, again)[0] == 0


def test_numbers_that_are_converted_are_not_shared(
    keeping: Receiver, client: FakeVllm, prefill: Prefill
) -> None:
    """What arrives in another dtype lies in an array of its own."""
    kv = prefill(80)
    turn(client, kv)
    settled(client)
    with connected(keeping, weights=WEIGHTS, kv_dtype="float16") as other:
        session = other.open(kv.prompt, GREEDY)
        assert held(other, session) == 0


def test_old_texts_make_room(tiny_llama_path: Path, prefill: Prefill) -> None:
    """A session is refused only when nothing is left to be given up."""
    with (
        started(tiny_llama_path, kv_memory=8 << 20, prompt_cache=True) as receiver,
        connected(receiver, weights=WEIGHTS) as client,
    ):
        texts = [prefill(500, seed=seed) for seed in range(8)]
        for kv in texts:
            assert turn(client, kv) == (0, kv.tokens)
            settled(client)
        assert 1 <= len(receiver.store.residents) < len(texts)
        assert receiver.store.residents.nbytes <= 8 << 20
        assert receiver.store.free_bytes == 8 << 20
        latest = prefill(followed(texts[-1], texts[-1].tokens, 3))
        assert turn(client, latest)[0] == 508
        settled(client)
        assert turn(client, texts[0])[0] == 0


@pytest.mark.parametrize("seed", range(3))
def test_a_tree_of_conversations(keeping: Receiver, prefill: Prefill, seed: int) -> None:
    """Any prompt after any others: branches, edits, aborts, several at once."""
    rng = random.Random(seed)
    empty(keeping)
    with connected(keeping, weights=WEIGHTS) as client:
        texts: list[tuple[int, ...]] = [tuple(rng.choices(range(20, 4000), k=40))]
        saved = 0
        for _ in range(14):
            chosen = [rng.choice(texts) for _ in range(rng.randint(1, 3))]
            cut = [text[: rng.choice([len(text), len(text), rng.randint(1, len(text))])]
                   for text in chosen]  # fmt: skip
            kvs = [prefill((*text, *rng.choices(range(20, 4000), k=rng.choice([1, 5, 70]))))
                   for text in cut]  # fmt: skip
            sessions = [client.open(kv.prompt, GREEDY) for kv in kvs]
            for session, kv in zip(sessions, kvs, strict=True):
                start = held(client, session)
                saved += start
                send_rest(client, session, kv, start)
                client.start(session, kv.first)
            for session, kv in zip(sessions, kvs, strict=True):
                if rng.random() < 0.2:
                    client.cancel(session)
                    continue
                assert [kv.first, *client.tokens(session)] == kv.tokens
                texts.append((*kv.prompt, *kv.tokens))
            settled(client)
        assert saved > 100
    empty(keeping)


@pytest.mark.parametrize("length", [20, 300, 2300])
def test_what_mlx_itself_need_not_prefill(keeping: Receiver, prefill: Prefill, length: int) -> None:
    """Turns, a branch, the same prompt again and several at once, without vLLM."""
    empty(keeping)
    kv = prefill(length)

    def held(*prompts: Prefilled) -> list[int]:
        jobs = [LocalJob(keeping.engine, kv.prompt, GREEDY, "mine") for kv in prompts]
        assert [job.tokens() for job in jobs] == [kv.tokens for kv in prompts]
        assert eventually(lambda: keeping.store.reserved_bytes == 0)
        return [job.held for job in jobs]

    assert held(kv) == [0]
    more = prefill(followed(kv, kv.tokens, *range(100, 180)))
    assert held(more) == [length + 8]
    branches = [prefill(followed(kv, kv.tokens, 7, 8, n)) for n in range(3)]
    assert held(*branches) == [length + 8] * 3
    assert held(more) == [len(more.prompt) - 1]
    assert LocalJob(keeping.engine, more.prompt, GREEDY, "another's").held == 0
    assert LocalJob(keeping.engine, more.prompt, GREEDY).held == 0
