"""Prompts of vLLM's requests that the receiver prefills itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import tokenizers

from mlx_receiver.receiver import Receiver
from mlx_receiver.wire.frames import Header
from mlx_receiver.wire.messages import Complete, Decoded, Failed, Opened, Ping, Refused, Status
from mlx_receiver.wire.sampling import Grammar, Sampling
from tests.mlx_receiver.client import FakeVllm, Prefilled, block, connected, started
from tests.mlx_receiver.conftest import Prefill
from tests.waiting import eventually

GREEDY = Sampling(max_tokens=8, temperature=0.0)
ALL = {"compute": "all"}


def idle(receiver: Receiver) -> bool:
    """Whether nothing is left of any session but what is kept."""
    store = receiver.store
    return not store.sessions() and not store.reserved_bytes and not receiver.engine.decoding


@pytest.fixture(scope="module")
def keeping(tiny_llama_path: Path) -> Iterator[Receiver]:
    """A receiver that keeps what texts leave."""
    with started(tiny_llama_path, http_port=0, prompt_cache=True) as receiver:
        yield receiver


def answer(client: FakeVllm, prompt: list[int], **changes: Any) -> tuple[int, list[int]]:
    """How many tokens of the prompt were computed, and the text."""
    session = client.open(prompt, GREEDY, ALL | changes)
    assert client.opened(session) == Opened(session)
    complete = client.complete(session)
    assert complete.kv_bytes == 0
    return complete.computed, client.tokens(session)


@pytest.mark.parametrize("tokens", [1, 2, 17, 257, 700])
def test_tokens_equal_mlx_alone(client: FakeVllm, prefill: Prefill, tokens: int) -> None:
    kv = prefill(tokens)
    assert answer(client, kv.prompt) == (tokens, kv.tokens)


def test_positions_finish_and_what_is_told(
    receiver: Receiver, client: FakeVllm, prefill: Prefill
) -> None:
    kv = prefill(17)
    session = client.open(kv.prompt, GREEDY, ALL)
    steps = list(client.steps(session))
    assert [step.position for step in steps] == list(range(8))
    assert [step.finish for step in steps] == [""] * 7 + ["length"]
    # ``Complete`` comes before the first of them.
    told = [type(said) for said in client.inbox if getattr(said, "session", 0) == session]
    assert told == [Opened, Complete]
    url = f"http://127.0.0.1:{receiver.http_port}/handoffs/request-{session}"
    assert eventually(lambda: httpx.get(url).json()["outcome"] == "finished")
    seen = httpx.get(url).json()
    assert seen["strategy"] == "mac" and seen["blocks"] == [] and seen["kv_bytes"] == 0
    assert (seen["prompt_tokens"], seen["output_tokens"]) == (17, 8)
    assert seen["opened_ns"] < seen["complete_ns"] <= seen["first_decoded_ns"] < seen["ended_ns"]


def test_the_first_token_may_be_the_last(client: FakeVllm, prefill: Prefill) -> None:
    kv = prefill(17)
    for sampling, finish in (
        (msgspec.structs.replace(GREEDY, max_tokens=1), "length"),
        (msgspec.structs.replace(GREEDY, eos_token_id=kv.first), "stop"),
    ):
        (only,) = client.steps(client.open(kv.prompt, sampling, ALL))
        assert (only.position, only.token_ids, only.finish) == (0, [kv.first], finish)
    held = msgspec.structs.replace(GREEDY, eos_token_id=kv.first, min_tokens=8)
    assert kv.first not in client.tokens(client.open(kv.prompt, held, ALL))


def test_both_strategies_side_by_side(client: FakeVllm, prefill: Prefill) -> None:
    kvs = [prefill(tokens, decode=30) for tokens in (255, 17, 257, 2)]
    sampling = msgspec.structs.replace(GREEDY, max_tokens=30)
    sessions = [
        client.request(kv, sampling) if index % 2 else client.open(kv.prompt, sampling, ALL)
        for index, kv in enumerate(kvs)
    ]
    for index, (session, kv) in enumerate(zip(sessions, kvs, strict=True)):
        assert [kv.first][: index % 2] + client.tokens(session) == kv.tokens


def test_logprobs_of_the_first_token(client: FakeVllm, prefill: Prefill) -> None:
    kv = prefill(17)
    steps = list(client.steps(client.open(
        kv.prompt, msgspec.structs.replace(GREEDY, logprobs=2), ALL)))  # fmt: skip
    assert [step.logprobs[0].token_ids[0] for step in steps] == kv.tokens
    assert all(len(step.logprobs[0].values) == 3 for step in steps)


def test_a_grammar_holds_from_the_first_token_on(
    client: FakeVllm, prefill: Prefill, tiny_llama_path: Path
) -> None:
    sampling = msgspec.structs.replace(
        GREEDY, max_tokens=16, grammar=Grammar("choice", '["yes"]'), eos_token_id=2
    )
    tokens = client.tokens(client.open(prefill(17).prompt, sampling, ALL))
    tokenizer = tokenizers.Tokenizer.from_file(str(tiny_llama_path / "tokenizer.json"))
    assert tokens[-1] == 2 and tokenizer.decode(tokens[:-1]) == "yes"


# --- what texts leave ---------------------------------------------------------------------------


def next_turn(kv: Prefilled, prefill: Prefill) -> Prefilled:
    return prefill(tuple([*kv.prompt, *kv.tokens, *range(30, 40)]))


def test_turns_of_either_strategy_continue_each_other(keeping: Receiver, prefill: Prefill) -> None:
    with connected(keeping, weights="w") as client:
        first = prefill(200, seed=1)
        assert answer(client, first.prompt) == (200, first.tokens)
        second = next_turn(first, prefill)
        # Nobody needs the cache of a last token: it may be there or not.
        computed, tokens = answer(client, second.prompt)
        assert computed in (10, 11) and tokens == second.tokens
        third = next_turn(second, prefill)
        session = client.open(third.prompt, GREEDY)
        opened = client.opened(session)
        held = opened.held.tokens
        assert held - len(second.prompt) in (7, 8)
        for layer, pair in enumerate(third.planes):
            for plane in range(2):
                rows = slice(held, len(third.prompt))
                header, payload = block(
                    session, third, layer, plane, slice(0, pair[plane].shape[0]), rows
                )
                assert client.data is not None
                client.data.send(header, [payload])
        client.start(session, third.first)
        assert [third.first, *client.tokens(session)] == third.tokens
        fourth = next_turn(third, prefill)
        again, tokens = answer(client, fourth.prompt)
        assert again in (10, 11) and tokens == fourth.tokens
        seen = httpx.get(f"http://127.0.0.1:{keeping.http_port}/handoffs").json()
        assert [one["strategy"] for one in seen] == ["mac", "mac", "split", "mac"]
        assert [one["held_tokens"] for one in seen] == [
            0, len(second.prompt) - computed, held, len(fourth.prompt) - again,
        ]  # fmt: skip
    assert eventually(lambda: idle(keeping))


def test_what_is_left_is_found_only_under_the_same_salt(
    keeping: Receiver, prefill: Prefill
) -> None:
    with connected(keeping, weights="w") as client:
        kv = prefill(100, seed=2)
        assert answer(client, kv.prompt, salt="one")[0] == 100
        assert answer(client, kv.prompt, salt="two")[0] == 100
        assert answer(client, kv.prompt, salt="one") == (1, kv.tokens)


def test_a_long_conversation_is_continued_where_it_lies(
    tiny_llama_path: Path, prefill: Prefill
) -> None:
    """There is no room for it twice: only its first continuation is a copy."""
    with started(tiny_llama_path, kv_memory=3 << 20, prompt_cache=True) as receiver:
        with connected(receiver, weights="w") as client:
            kv = prefill(600, seed=3)
            assert answer(client, kv.prompt) == (600, kv.tokens)
            for _ in range(3):
                kv = next_turn(kv, prefill)
                computed, tokens = answer(client, kv.prompt)
                assert computed in (10, 11) and tokens == kv.tokens
        assert eventually(lambda: idle(receiver))
        assert len(receiver.store.residents) == 1


def test_what_waits_or_is_cancelled_leaves_the_earlier_text_as_it_was(
    tiny_llama_path: Path, prefill: Prefill
) -> None:
    with started(tiny_llama_path, max_batch=1, prompt_cache=True) as receiver:
        with connected(receiver, weights="w") as client:
            kv = prefill(100, seed=4)
            answer(client, kv.prompt)
            running = long(client, prefill, 17)
            client.wait(lambda said: isinstance(said, Decoded) and said.session == running)
            following = next_turn(kv, prefill)
            one = client.open(following.prompt, GREEDY, ALL)
            two = client.open(following.prompt, GREEDY, ALL)
            for session in (one, two):
                client.opened(session)
            client.cancel(one)
            client.cancel(running)
            assert client.tokens(two) == following.tokens
            assert client.complete(two).computed in (10, 11)
            assert answer(client, next_turn(kv, prefill).prompt)[0] == 1
        assert eventually(lambda: idle(receiver))


# --- ends ---------------------------------------------------------------------------------------


def long(client: FakeVllm, prefill: Prefill, tokens: int = 700) -> int:
    sampling = msgspec.structs.replace(GREEDY, max_tokens=2000)
    return client.open(prefill(tokens).prompt, sampling, ALL)


def test_cancelled_before_and_after_the_first_token(
    receiver: Receiver, client: FakeVllm, prefill: Prefill
) -> None:
    early = long(client, prefill)
    client.cancel(early)
    late = long(client, prefill)
    client.wait(lambda said: isinstance(said, Decoded) and said.session == late)
    client.cancel(late)
    assert eventually(lambda: idle(receiver))
    outcomes = [ended.timeline.outcome for ended in receiver.store.recent()[-2:]]
    assert outcomes == ["cancelled", "cancelled"]


def test_a_client_that_leaves_takes_its_sessions_along(
    receiver: Receiver, prefill: Prefill
) -> None:
    with connected(receiver) as client:
        client.opened(long(client, prefill))
    assert eventually(lambda: idle(receiver))


def test_a_session_is_refused_like_any_other(tiny_llama_path: Path, prefill: Prefill) -> None:
    prompt = prefill(700).prompt
    with started(tiny_llama_path, kv_memory=1 << 22, max_sessions=1) as receiver:
        with connected(receiver) as client:
            refused = client.opened(client.open(prompt * 4, GREEDY, ALL))
            assert isinstance(refused, Refused) and refused.code == "capacity"
            assert eventually(lambda: idle(receiver))
            for wrong in ({"proof": True}, {"unclaimed": True}):
                refused = client.opened(client.open([5, 6], GREEDY, ALL | wrong))
                assert isinstance(refused, Refused) and refused.code == "unsupported"
            running = client.open([5, 6], msgspec.structs.replace(GREEDY, max_tokens=900), ALL)
            assert isinstance(client.opened(running), Opened)
            refused = client.opened(client.open([5, 6], GREEDY, ALL))
            assert isinstance(refused, Refused) and "--max-sessions" in refused.reason
            client.cancel(running)
            assert eventually(lambda: idle(receiver))


def test_a_stopping_receiver_says_so(tiny_llama_path: Path, prefill: Prefill) -> None:
    with started(tiny_llama_path) as receiver, connected(receiver) as client:
        session = long(client, prefill)
        client.opened(session)
        receiver.control.stop()
        assert client.failed(session).code == "shutdown"


def test_nothing_may_arrive_for_it(receiver: Receiver, client: FakeVllm, prefill: Prefill) -> None:
    kv = prefill(700)
    session = client.open(kv.prompt, GREEDY, ALL)
    client.opened(session)
    header, payload = block(session, kv, 0, 0, slice(0, 1), slice(0, 1))
    assert isinstance(header, Header) and client.data is not None
    client.data.send(header, [payload])
    client.start(session, 5)
    assert client.tokens(session) == kv.tokens
    assert not any(isinstance(said, Failed) for said in client.inbox)


# --- progress -----------------------------------------------------------------------------------


def test_progress_is_visible_while_the_prompt_is_computed(
    receiver: Receiver, client: FakeVllm, prefill: Prefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_receiver.decode.batch._LONGEST_CHUNK", 16)
    session = long(client, prefill, 1500)
    seen: list[Any] = []
    while not seen or seen[-1].tokens == 0:
        client.send(Ping(0))
        status = client.wait(lambda said: isinstance(said, Status))
        seen += [said for said in status.sessions if said.session == session]
    client.cancel(session)
    assert all(one.kv_bytes == 0 for one in seen)
    counts = [one.computed for one in seen]
    assert counts == sorted(counts) and len(set(counts)) > 3 and counts[-1] <= 1500
    assert {one.state for one in seen if not one.computed and not one.tokens} <= {"queued"}
    assert {one.state for one in seen if one.computed} == {"decoding"}


def test_one_that_waits_for_its_turn_is_queued(tiny_llama_path: Path, prefill: Prefill) -> None:
    with started(tiny_llama_path, max_batch=1) as receiver, connected(receiver) as client:
        running = long(client, prefill, 17)
        client.wait(lambda said: isinstance(said, Decoded))
        waiting = long(client, prefill, 17)
        client.opened(waiting)
        client.send(Ping(0))
        status = client.wait(lambda said: isinstance(said, Status) and len(said.sessions) == 2)
        assert {one.session: one.state for one in status.sessions} == {
            running: "decoding", waiting: "queued",
        }  # fmt: skip
        assert status.load == 2
