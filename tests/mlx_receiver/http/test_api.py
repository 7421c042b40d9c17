"""The OpenAI-compatible API on the tiny model, over its real port."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from starlette.requests import Request
from starlette.responses import StreamingResponse

from mlx_receiver.http.openai.completions import completions
from mlx_receiver.http.openai.service import Service
from mlx_receiver.http.openai.streams import DONE
from mlx_receiver.receiver import Receiver
from mlx_receiver.settings import Settings
from tests.conftest import own_address
from tests.mlx_receiver.client import HERE, started
from tests.mlx_receiver.conftest import Prefill
from tests.mlx_receiver.http.test_http import url
from tests.waiting import eventually

PROMPT = "The quick brown fox jumps over"


@pytest.fixture(scope="module")
def base(receiver: Receiver) -> str:
    return url(receiver, "")


@pytest.fixture(scope="module")
def client(base: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def complete(base: str, status: int = 200, **fields: Any) -> Any:
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True} | fields
    answer = httpx.post(f"{base}/v1/completions", json=body, timeout=60)
    assert answer.status_code == status, answer.text
    return answer.json()


def chunks(base: str, path: str = "completions", **fields: Any) -> list[dict[str, Any]]:
    body = {"max_tokens": 12, "temperature": 0, "ignore_eos": True, "stream": True} | fields
    if path == "completions":
        body = {"prompt": PROMPT} | body
    with httpx.stream("POST", f"{base}/v1/{path}", json=body, timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = answer.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: ") for event in events[:-1])
    return [json.loads(event[6:]) for event in events[:-2]]


def test_token_ids_continue_as_mlx_does(base: str, prefill: Prefill) -> None:
    kv = prefill(33)
    answer = complete(base, prompt=kv.prompt, max_tokens=8, return_token_ids=True)
    (choice,) = answer["choices"]
    assert choice["token_ids"] == kv.tokens
    assert choice["prompt_token_ids"] == kv.prompt
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", None)
    assert answer["usage"] == {
        "prompt_tokens": 33,
        "completion_tokens": 8,
        "total_tokens": 41,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_every_form_of_prompt(base: str) -> None:
    one = complete(base, prompt=PROMPT, return_token_ids=True)["choices"][0]
    ids = one["prompt_token_ids"]
    assert complete(base, prompt=ids)["choices"][0]["text"] == one["text"]
    two = complete(base, prompt=[PROMPT, "Once upon a time"])
    assert [choice["index"] for choice in two["choices"]] == [0, 1]
    assert two["choices"][0]["text"] == one["text"]
    lists = complete(base, prompt=[ids, ids[:3]])
    assert lists["choices"][0]["text"] == one["text"]
    assert lists["usage"]["prompt_tokens"] == len(ids) + 3
    assert lists["usage"]["completion_tokens"] == 24


def test_a_stream_says_what_the_whole_answer_says(base: str) -> None:
    whole = complete(base, logprobs=3, return_token_ids=True)
    parts = chunks(base, logprobs=3, return_token_ids=True, stream_options={"include_usage": True})
    *parts, last = parts
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert all(part["object"] == "text_completion" for part in parts)
    choices = [part["choices"][0] for part in parts]
    (expected,) = whole["choices"]
    assert "".join(choice["text"] for choice in choices) == expected["text"]
    assert [t for choice in choices for t in choice["token_ids"]] == expected["token_ids"]
    assert choices[0]["prompt_token_ids"] == expected["prompt_token_ids"]
    for name in ("tokens", "text_offset", "token_logprobs", "top_logprobs"):
        joined = [value for choice in choices for value in choice["logprobs"][name]]
        assert joined == expected["logprobs"][name], name
    assert [choice["finish_reason"] for choice in choices] == [None] * 11 + ["length"]


def test_continuous_usage_counts_what_was_sent(receiver: Receiver) -> None:
    """Not what is decoded by then: here the client is the slower one."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": PROMPT, "max_tokens": 12, "ignore_eos": True, "stream": True,
            "stream_options": options}  # fmt: skip
    arriving = [{"type": "http.request", "body": json.dumps(body).encode()}]

    async def receive() -> dict[str, Any]:
        if not arriving:
            await asyncio.Event().wait()  # the client stays
        return arriving.pop()

    async def read_slowly() -> list[int]:
        request = Request({"type": "http", "method": "POST", "headers": []}, receive)
        answer = await completions(Service(receiver), request)
        assert isinstance(answer, StreamingResponse)
        counts = []
        async for event in answer.body_iterator:
            if bytes(event) != DONE:
                counts.append(json.loads(bytes(event)[6:])["usage"]["completion_tokens"])
            await asyncio.sleep(0.1)
        return counts

    assert asyncio.run(read_slowly()) == [*range(1, 13), 12]


def test_stop_strings_end_the_text_and_are_never_shown_in_part(base: str) -> None:
    text = complete(base)["choices"][0]["text"]
    stop = text[9:16]
    expected = text[: text.index(stop)]
    answer = complete(base, stop=["never seen", stop])["choices"][0]
    assert answer["text"] == expected
    assert (answer["finish_reason"], answer["stop_reason"]) == ("stop", stop)
    parts = [part["choices"][0] for part in chunks(base, stop=stop)]
    shown = ""
    for part in parts:
        shown += part["text"]
        assert expected.startswith(shown)
    assert shown == expected
    assert parts[-1]["stop_reason"] == stop
    included = complete(base, stop=stop, include_stop_str_in_output=True)["choices"][0]
    assert included["text"] == expected + stop
    # A beginning of a stop string that comes to nothing is shown after all.
    missed = stop + "\0"
    assert complete(base, stop=missed)["choices"][0]["text"] == text
    assert "".join(p["choices"][0]["text"] for p in chunks(base, stop=missed)) == text


def test_stop_tokens_and_min_tokens(base: str, prefill: Prefill) -> None:
    kv = prefill(33)
    asked = {"prompt": kv.prompt, "max_tokens": 8, "return_token_ids": True}
    answer = complete(base, **asked, stop_token_ids=[kv.tokens[3]])["choices"][0]
    assert answer["token_ids"] == kv.tokens[:4]
    assert (answer["finish_reason"], answer["stop_reason"]) == ("stop", kv.tokens[3])
    full = complete(base, **asked)["choices"][0]["text"]
    assert full.startswith(answer["text"]) and answer["text"] != full
    later = complete(base, **asked, stop_token_ids=[kv.tokens[3]], min_tokens=6)["choices"][0]
    assert len(later["token_ids"]) >= 6 and later["token_ids"][3] != kv.tokens[3]
    held = complete(base, **asked, stop=full[:2], min_tokens=5)["choices"][0]
    assert len(held["token_ids"]) > 5


def test_samples_differ_and_a_seed_repeats_them(base: str) -> None:
    asked = {"n": 3, "temperature": 1.0, "seed": 5, "top_p": 0.95, "top_k": 50}
    first = [choice["text"] for choice in complete(base, **asked)["choices"]]
    assert len(set(first)) == 3
    assert [choice["text"] for choice in complete(base, **asked)["choices"]] == first
    assert complete(base, **asked)["usage"]["completion_tokens"] == 36
    streamed = ["", "", ""]
    for part in chunks(base, **asked):
        streamed[part["choices"][0]["index"]] += part["choices"][0]["text"]
    assert streamed == first


def test_log_probabilities(base: str) -> None:
    found = complete(base, logprobs=2, max_tokens=4)["choices"][0]["logprobs"]
    assert len(found["tokens"]) == len(found["token_logprobs"]) == 4
    for token, value, top in zip(
        found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True
    ):
        assert top[token] == max(top.values()) == value < 0
        assert len(top) == 2
    assert found["text_offset"][0] == 0
    as_ids = complete(base, logprobs=0, max_tokens=1, return_tokens_as_token_ids=True)
    assert as_ids["choices"][0]["logprobs"]["tokens"][0].startswith("token_id:")


def test_echo(base: str) -> None:
    plain = complete(base)["choices"][0]["text"]
    assert complete(base, echo=True)["choices"][0]["text"] == PROMPT + plain
    streamed = "".join(p["choices"][0]["text"] for p in chunks(base, echo=True))
    assert streamed == PROMPT + plain


def test_biases_and_allowed_tokens(base: str) -> None:
    only = complete(base, allowed_token_ids=[500], return_token_ids=True, max_tokens=3)
    assert only["choices"][0]["token_ids"] == [500] * 3
    forced = complete(base, logit_bias={"700": 100}, return_token_ids=True, max_tokens=2)
    assert forced["choices"][0]["token_ids"] == [700] * 2
    word = complete(base, logprobs=0, max_tokens=1)["choices"][0]["logprobs"]["tokens"][0]
    assert not complete(base, bad_words=[word])["choices"][0]["text"].startswith(word)


def test_the_openai_client_chats(client: openai.OpenAI, model: str) -> None:
    asked: Any = {
        "model": model,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        ],
        "max_completion_tokens": 10,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
    }
    answer = client.chat.completions.create(**asked)
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert len(choice.logprobs.content) == 10
    assert len(choice.logprobs.content[0].top_logprobs) == 2
    assert answer.usage is not None and answer.usage.completion_tokens == 10
    options: Any = {"include_usage": True}
    parts = list(client.chat.completions.create(**asked, stream=True, stream_options=options))
    assert parts[0].choices[0].delta.role == "assistant"
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == choice.message.content
    assert parts[-2].choices[0].finish_reason == "length"
    assert parts[-1].usage == answer.usage


def test_the_openai_client_completes(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=5, temperature=0)
    streamed = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=5, temperature=0, stream=True
    )
    assert "".join(part.choices[0].text for part in streamed) == answer.choices[0].text
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.completions.create(model="another", prompt="x")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": ""}, "empty"),
        ({"prompt": [1, "a"]}, "prompt must be"),
        ({"prompt": [10**6]}, "vocabulary"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": 13}, "min_tokens"),
        ({"n": 0}, "`$.n`"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"logprobs": 21}, "`$.logprobs`"),
        ({"stop": [""]}, "`$.stop[0]`"),
        ({"suffix": "x"}, "suffix"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"response_format": {"type": "other"}}, "response_format of the type 'other'"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs has one of"),
        ({"structured_outputs": {"regex": "("}}, "the grammar is refused"),
        ({"structured_outputs": {"regex": "a" * 200_000}}, "more than 131072 characters"),
        ({"structured_outputs": {"regex": "a"}, "min_tokens": 3}, "min_tokens above 1"),
        ({"logit_bias": {"a": 1}}, "logit_bias has keys that are no token ids: 'a'"),
        ({"thinking_token_budget": 5}, "has tokens for reasoning"),
        ({"thinking_token_budget": -2}, "`$.thinking_token_budget`"),
        ({"thinking_token_budget": 1.5}, "`$.thinking_token_budget`"),
        ({"temperature": "hot"}, r"\$.temperature"),
        ({"prompt": [20] * 8192}, "8192 tokens"),
    ],
)
def test_what_cannot_be_done_is_said(base: str, fields: dict[str, Any], said: str) -> None:
    error = complete(base, 400, **fields)["error"]
    assert said.replace("\\", "") in error["message"]
    assert (error["type"], error["code"]) == ("BadRequestError", 400)


def test_log_probabilities_of_named_tokens(base: str) -> None:
    likely = complete(base, logprobs=5, return_tokens_as_token_ids=True)["choices"][0]["logprobs"]
    ids = [int(name.split(":")[1]) for name in likely["top_logprobs"][0]][2:4]
    asked = {"logprob_token_ids": ids, "return_tokens_as_token_ids": True}
    named = complete(base, logprobs=1, **asked)["choices"][0]["logprobs"]
    assert named["tokens"] == likely["tokens"]
    for sampled, alternatives in zip(named["tokens"], named["top_logprobs"], strict=True):
        assert alternatives.keys() == {sampled, *(f"token_id:{token}" for token in ids)}
    for name, value in named["top_logprobs"][0].items():
        assert value == pytest.approx(likely["top_logprobs"][0][name], abs=1e-4)
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "temperature": 0}
    chat = httpx.post(f"{base}/v1/chat/completions", json=body | {"logprobs": True} | asked)
    for row in chat.json()["choices"][0]["logprobs"]["content"]:
        told = [alternative["token"] for alternative in row["top_logprobs"]]
        assert told == list(dict.fromkeys([row["token"], *(f"token_id:{t}" for t in ids)]))
    refused = httpx.post(f"{base}/v1/chat/completions", json=body | asked)
    assert refused.status_code == 400 and "needs logprobs" in refused.text


def test_bad_bodies_and_unknown_fields(base: str) -> None:
    json_body = {"Content-Type": "application/json"}
    answer = httpx.post(f"{base}/v1/completions", content=b"{nonsense", headers=json_body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, 400)
    complete(base, max_tokens=1, user="me", bootstrap_room=3, do_not_know={"a": 1})
    choice = {"messages": [{"role": "user", "content": "x"}], "tool_choice": "required"}
    refused = httpx.post(f"{base}/v1/chat/completions", json=choice)
    assert refused.status_code == 400 and "tool_choice" in refused.text


def test_a_client_that_goes_away_stops_the_decoding(base: str, receiver: Receiver) -> None:
    body = {"prompt": PROMPT, "max_tokens": 8000, "ignore_eos": True}
    with httpx.stream(
        "POST", f"{base}/v1/completions", json={**body, "stream": True}, timeout=60
    ) as answer:
        next(answer.iter_lines())
        assert eventually(lambda: receiver.engine.decoding == 1)
    assert eventually(lambda: not receiver.engine.decoding)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{base}/v1/completions", json=body, timeout=1)
    assert eventually(lambda: not receiver.engine.decoding)


def test_requests_share_the_batch(base: str, receiver: Receiver) -> None:
    expected = [complete(base, prompt=f"{PROMPT} {i}")["choices"][0]["text"] for i in range(4)]
    got = [""] * 4

    def ask(i: int) -> None:
        got[i] = complete(base, prompt=f"{PROMPT} {i}")["choices"][0]["text"]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == expected


def test_the_api_key(tiny_llama_path: Path) -> None:
    settings = Settings(
        model=str(tiny_llama_path), **HERE, port=0, http_port=0, api_key="sesame",
        served_model_name="tiny",
    )  # fmt: skip
    with Receiver(settings) as receiver:
        v1 = url(receiver, "/v1")
        assert httpx.get(url(receiver, "/health")).status_code == 200
        for key in ("sesam", "wrong"):
            headers = {"Authorization": f"Bearer {key}"}
            answer = httpx.get(f"{v1}/models", headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, 401)
        with openai.OpenAI(base_url=v1, api_key="sesame") as client:
            assert client.models.list().data[0].id == "tiny"
            client.completions.create(model="tiny", prompt="a", max_tokens=1)


def test_other_machines_need_a_key(tiny_llama_path: Path) -> None:
    """Without one the API is this machine's, and says so to others."""
    other = own_address()
    with started(tiny_llama_path, host="*", http_port=0) as receiver:
        assert receiver.http is not None
        port = receiver.http.port
        assert httpx.get(f"http://127.0.0.1:{port}/v1/models").status_code == 200
        for path in ("/v1/models", "/metrics", "/handoffs"):
            answer = httpx.get(f"http://{other}:{port}{path}")
            assert answer.status_code == 403
            assert "--api-key" in answer.json()["error"]["message"]
        assert httpx.get(f"http://{other}:{port}/health").json() == {"status": "ok"}


def test_chat_echo(base: str) -> None:
    """The last message is repeated where its author goes on."""
    said = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Well, "}]
    body = {"messages": said, "max_tokens": 4, "temperature": 0, "ignore_eos": True}

    def ask(**fields: Any) -> dict[str, Any]:
        answer = httpx.post(f"{base}/v1/chat/completions", json=body | fields, timeout=60)
        return answer.json()["choices"][0]["message"]

    plain = ask()
    assert ask(echo=True) == plain | {"content": "Well, " + plain["content"]}
    assert ask(echo=True, messages=said[:1]) == ask(messages=said[:1])
    parts = chunks(base, "chat/completions", **body | {"echo": True})
    deltas = [part["choices"][0]["delta"] for part in parts]
    assert [delta["content"] for delta in deltas[:2]] == ["", "Well, "]
    assert "".join(delta["content"] for delta in deltas) == "Well, " + plain["content"]
    goes_on = ask(echo=True, messages=said[:1], add_generation_prompt=False)
    assert goes_on["role"] == "user" and goes_on["content"].startswith("Hello")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"stream_options": {"include_usage": True}}, "stream_options needs stream"),
        ({"seed": 2**63}, "`$.seed`"),
        ({"n": 2}, "greedy"),
        ({"stop": ["a"] * 5}, "`$.stop`"),
        ({"bad_words": ["a"] * 129}, "`$.bad_words`"),
        ({"prompt": ["x"] * 65, "n": 2, "temperature": 1}, "65 prompts times n = 2"),
        ({"logit_bias": {"7": 1, "x7": 2}}, "'x7'"),
        ({"repetition_detection": {"min_count": 2}}, "repetition_detection"),
        ({"prompt_embeds": "AA"}, "prompt_embeds"),
    ],
)
def test_what_vllm_refuses_is_refused(base: str, fields: dict[str, Any], said: str) -> None:
    error = complete(base, 400, **fields)["error"]
    assert said in error["message"] and error["param"] in {*fields, "n"}


def test_what_vllm_accepts_is_accepted(base: str) -> None:
    usage = {"include_usage": None, "continuous_usage_stats": None}
    assert chunks(base, max_tokens=1, stream_options=usage)[-1]["choices"]
    assert complete(base, max_tokens="1", echo="yes")["choices"][0]["text"].startswith(PROMPT)
    said = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "logprobs": "true"}
    answer = httpx.post(f"{base}/v1/chat/completions", json=said, timeout=60)
    assert answer.json()["choices"][0]["logprobs"]["content"]
    seeded = {"seed": 2**63 - 1, "n": 2, "temperature": 1, "max_tokens": 2}
    assert len(complete(base, **seeded)["choices"]) == 2
