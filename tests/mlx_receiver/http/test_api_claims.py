"""Decode requests behind a router: the hand-written vLLM leaves a session, the API claims it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from mlx_receiver.receiver import Receiver
from mlx_receiver.sessions import overdue
from mlx_receiver.wire.messages import Complete, Opened
from mlx_receiver.wire.sampling import Grammar, Sampling
from tests.mlx_receiver.client import FakeVllm, Prefilled
from tests.mlx_receiver.conftest import Prefill
from tests.mlx_receiver.http.test_http import url, values
from tests.waiting import eventually


def leave_unclaimed(client: FakeVllm, kv: Prefilled, *, send: bool = True) -> int:
    session = client.open(kv.prompt, Sampling(max_tokens=1), {"unclaimed": True})
    assert isinstance(client.opened(session), Opened)
    if send:
        client.send_kv(session, kv)
        client.complete(session)
    return session


def params(kv: Prefilled, session: int | None, **more: Any) -> dict[str, Any]:
    ours = {
        "session": None if session is None else str(session),
        "first_token": kv.first,
        "prompt_token_ids": kv.prompt,
        **more,
    }
    return {"do_remote_prefill": True, "do_remote_decode": False, "mac_decode": ours}


def ask(receiver: Receiver, transfer: dict[str, Any], **fields: Any) -> dict[str, Any]:
    body = {
        "model": "what the router's clients call it",
        "max_tokens": 8,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "kv_transfer_params": transfer,
    } | fields
    answer = httpx.post(url(receiver, "/v1/completions"), json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def tokens(answer: dict[str, Any]) -> list[int]:
    return answer["choices"][0]["token_ids"]


def test_an_unclaimed_session_is_continued(client: FakeVllm, prefill: Prefill) -> None:
    receiver, kv = client.receiver, prefill(33)
    before = values(receiver)
    transfer = params(kv, leave_unclaimed(client, kv)) | {"remote_prefill_cached_tokens": 16}
    answer = ask(receiver, transfer)
    assert tokens(answer) == kv.tokens
    assert answer["choices"][0]["prompt_token_ids"] == kv.prompt
    assert answer["usage"]["prompt_tokens"] == 33
    assert answer["usage"]["completion_tokens"] == 8
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 16}
    after = values(receiver)
    # Seven steps: the first token came with the request, and the prompt was not prefilled.
    assert (
        after["mlx_receiver_decoded_tokens_total"] - before["mlx_receiver_decoded_tokens_total"]
        == 7
    )
    assert eventually(lambda: not receiver.store.sessions() and not receiver.store.reserved_bytes)


def test_claiming_before_the_last_block(client: FakeVllm, prefill: Prefill) -> None:
    receiver, kv = client.receiver, prefill(40)
    session = leave_unclaimed(client, kv, send=False)
    body = {
        "messages": [{"role": "user", "content": "not rendered here"}],
        "max_tokens": 8,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
        "kv_transfer_params": params(kv, session),
    }
    with httpx.stream(
        "POST", url(receiver, "/v1/chat/completions"), json=body, timeout=60
    ) as answer:
        lines = (line for line in answer.iter_lines() if line)
        next(lines), next(lines)
        # The first token is out; now the rest of the KV comes.
        client.send_kv(session, kv)
        rest = list(lines)
    assert rest[-1] == "data: [DONE]" and len(rest) == 8
    assert isinstance(client.complete(session), Complete), "who sends the blocks is told"


def test_claiming_before_the_memory_is_there(client: FakeVllm, prefill: Prefill) -> None:
    """vLLM may have nothing to compute of a prompt: who claims it is then faster than Opened."""
    receiver, kv = client.receiver, prefill(33)
    allowed = threading.Event()
    receiver.store._allocation._allocator.submit(allowed.wait, 60)
    session = client.open(kv.prompt, Sampling(max_tokens=1), {"unclaimed": True})
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, receiver, params(kv, session))
        assert eventually(lambda: (s := receiver.store.get(session)) and not s.unclaimed)
        allowed.set()
        assert isinstance(client.opened(session), Opened), "who sends the blocks is told"
        client.send_kv(session, kv)
        client.complete(session)
        assert tokens(answer.result()) == kv.tokens


def test_who_claims_says_what_the_text_conforms_to(
    client: FakeVllm, prefill: Prefill, caplog: pytest.LogCaptureFixture
) -> None:
    """And not who left it."""
    kv = prefill(33)
    left = Sampling(max_tokens=1, grammar=Grammar("regex", "[0-9]{40}"))
    session = client.open(kv.prompt, left, {"unclaimed": True})
    assert isinstance(client.opened(session), Opened)
    client.send_kv(session, kv)
    client.complete(session)
    anything = {"structured_outputs": {"regex": "[\\s\\S]*"}}
    assert tokens(ask(client.receiver, params(kv, session), **anything))[0] == kv.first
    assert "was lost" not in caplog.text


@pytest.mark.parametrize("session", [None, 12345])
def test_an_unknown_session_is_prefilled_here(
    receiver: Receiver, prefill: Prefill, session: int | None
) -> None:
    kv = prefill(33)
    assert tokens(ask(receiver, params(kv, session))) == kv.tokens


def test_the_first_token_is_kept_whatever_this_side_would_sample(
    receiver: Receiver, prefill: Prefill
) -> None:
    kv = prefill(33)
    transfer = params(kv, None)
    transfer["mac_decode"]["first_token"] = 777
    assert tokens(ask(receiver, transfer, max_tokens=3))[0] == 777


def test_a_session_whose_sender_goes_away_is_prefilled_here(
    client: FakeVllm, prefill: Prefill
) -> None:
    kv = prefill(33)
    session = leave_unclaimed(client, kv, send=False)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, client.receiver, params(kv, session))
        opened = client.receiver.store.get(session)
        assert opened is not None and eventually(lambda: not opened.unclaimed)
        client.cancel(session)
        assert tokens(answer.result()) == kv.tokens


def test_another_prompt_cannot_claim_it(client: FakeVllm, prefill: Prefill) -> None:
    kv, other = prefill(33), prefill(34)
    session = leave_unclaimed(client, kv)
    assert tokens(ask(client.receiver, params(other, session))) == other.tokens
    assert client.receiver.store.get(session) is not None
    assert tokens(ask(client.receiver, params(kv, session))) == kv.tokens


def test_a_session_that_nobody_claims_expires(
    client: FakeVllm, prefill: Prefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overdue, "LEASE_SECONDS", 0.3)
    kv = prefill(33)
    session = leave_unclaimed(client, kv)
    assert "nobody claimed it" in client.failed(session).reason
    assert not client.receiver.store.reserved_bytes
    assert tokens(ask(client.receiver, params(kv, session))) == kv.tokens


def test_the_first_token_may_end_the_text(client: FakeVllm, prefill: Prefill) -> None:
    kv = prefill(33)
    stopped = ask(
        client.receiver, params(kv, leave_unclaimed(client, kv)), stop_token_ids=[kv.first]
    )
    assert tokens(stopped) == [kv.first]
    assert stopped["choices"][0]["finish_reason"] == "stop"
    one = ask(client.receiver, params(kv, leave_unclaimed(client, kv)), max_tokens=1)
    assert (tokens(one), one["choices"][0]["finish_reason"]) == ([kv.first], "length")
    text = one["choices"][0]["text"]
    by_text = ask(client.receiver, params(kv, leave_unclaimed(client, kv)), stop=text.strip())
    assert len(tokens(by_text)) == 1
    assert eventually(lambda: not client.receiver.store.sessions())


def test_the_first_tokens_log_probabilities(client: FakeVllm, prefill: Prefill) -> None:
    kv = prefill(33)
    whole = ask(client.receiver, params(kv, None), logprobs=1)["choices"][0]["logprobs"]
    given = {"token_ids": [kv.first, kv.first], "values": [-0.5, -0.5], "rank": 1}
    transfer = params(kv, leave_unclaimed(client, kv), logprobs=given)
    found = ask(client.receiver, transfer, logprobs=1)["choices"][0]["logprobs"]
    assert found["tokens"] == whole["tokens"]
    assert found["token_logprobs"][0] == -0.5
    assert found["token_logprobs"][1:] == pytest.approx(whole["token_logprobs"][1:], abs=1e-4)


def test_a_client_that_goes_away_ends_the_session(client: FakeVllm, prefill: Prefill) -> None:
    kv = prefill(33)
    receiver, session = client.receiver, leave_unclaimed(client, kv)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            url(receiver, "/v1/completions"),
            json={
                "max_tokens": 8000,
                "ignore_eos": True,
                "kv_transfer_params": params(kv, session),
            },
            timeout=0.7,
        )
    assert eventually(lambda: not receiver.engine.decoding and not receiver.store.sessions())


def test_nonsense_is_refused(receiver: Receiver) -> None:
    body = {"prompt": "x", "kv_transfer_params": {"mac_decode": {"first_token": "x"}}}
    answer = httpx.post(url(receiver, "/v1/completions"), json=body)
    assert answer.status_code == 400 and "mac_decode" in answer.text
    # Another connector's parameters mean nothing here.
    body = {"prompt": "x", "max_tokens": 1, "kv_transfer_params": {"do_remote_prefill": True}}
    assert httpx.post(url(receiver, "/v1/completions"), json=body).status_code == 200


def test_another_prompt_than_the_one_that_was_prefilled_is_refused(
    receiver: Receiver, prefill: Prefill
) -> None:
    kv, other = prefill(33), prefill(34)

    def post(**fields: Any) -> httpx.Response:
        body = {"max_tokens": 2, "temperature": 0, "return_token_ids": True} | fields
        return httpx.post(url(receiver, "/v1/completions"), json=body, timeout=60)

    transfer = params(kv, None)
    for prompt in (other.prompt, "another text", [other.prompt, "x"]):
        answer = post(prompt=prompt, kv_transfer_params=transfer)
        assert answer.status_code == 400 and "prompt is another" in answer.text
    for prompt in (None, "", kv.prompt, [kv.prompt]):
        answer = post(prompt=prompt, kv_transfer_params=transfer)
        assert answer.json()["choices"][0]["prompt_token_ids"] == kv.prompt
    both = transfer | {"prompt_token_ids": other.prompt}
    answer = post(kv_transfer_params=both)
    assert answer.status_code == 400 and "another prompt" in answer.text
    assert post(prompt="").status_code == 400 and post().status_code == 400


def test_a_forwarded_prompt_stands_for_the_bodys(receiver: Receiver, prefill: Prefill) -> None:
    """As in vLLM: a prefilling server's token ids, without a session of ours."""
    kv = prefill(33)
    shared = {"max_tokens": 4, "temperature": 0, "ignore_eos": True, "return_token_ids": True,
              "kv_transfer_params": {"prompt_token_ids": kv.prompt}}  # fmt: skip
    text = httpx.post(
        url(receiver, "/v1/completions"), json=shared | {"prompt": "not this"}, timeout=60
    ).json()
    assert text["choices"][0]["prompt_token_ids"] == kv.prompt and tokens(text) == kv.tokens[:4]
    said = {"messages": [{"role": "user", "content": "not this"}]}
    chat = httpx.post(url(receiver, "/v1/chat/completions"), json=shared | said, timeout=60).json()
    assert chat["prompt_token_ids"] == kv.prompt and tokens(chat) == kv.tokens[:4]
