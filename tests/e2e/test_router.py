"""Behind routers: vLLM prefills, the receiver decodes, and the text is that of either alone."""

from __future__ import annotations

import random
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer

from tests.conftest import free_port
from tests.mlx_alone import greedy
from tests.servers import Receiver, Server, Vllm, metric, start_receiver
from tests.waiting import eventually

pytestmark = pytest.mark.server

TOKENS = 10

PREFILL = {"do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None,
           "remote_block_ids": None, "remote_host": None, "remote_port": None}  # fmt: skip


def api(receiver: Receiver) -> str:
    return receiver.url


def ask(base: str, path: str = "completions", **fields: Any) -> dict[str, Any]:
    body = {"model": "m", "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True} | fields
    answer = httpx.post(f"{base}/v1/{path}", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def text(answer: dict[str, Any]) -> str:
    if "output" in answer:
        return answer["output"][0]["content"][0]["text"]
    if "content" in answer:
        return answer["content"][0]["text"]
    choice = answer["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def decoded(receiver: Receiver) -> float:
    return receiver.metric("mlx_receiver_decoded_tokens_total")


def kv_bytes(receiver: Receiver) -> float:
    """What came from P, now or with an earlier text, which counts, too."""
    names = ("mlx_receiver_kv_bytes_total", "mlx_receiver_held_tokens_total")
    return sum(receiver.metric(name) for name in names)


class Proxy:
    """vLLM's example of a disaggregated proxy: the same request to P for one token, then to D."""

    def __init__(self, prefill: str, decode: str) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                request = httpx.Response(200, content=body).json()
                limit = "max_output_tokens" if "responses" in self.path else "max_tokens"
                first = request | {limit: 1, "stream": False, "kv_transfer_params": PREFILL}
                answer = httpx.post(prefill + self.path, json=first, timeout=60).json()
                second = request | {"kv_transfer_params": answer["kv_transfer_params"]}
                final = httpx.post(decode + self.path, json=second, timeout=60)
                self.send_response(final.status_code)
                self.send_header("Content-Length", str(len(final.content)))
                self.end_headers()
                self.wfile.write(final.content)

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture(scope="module")
def proxy(vllm: Vllm, receiver: Receiver) -> Iterator[str]:
    """The plain protocol, without a router."""
    made = Proxy(vllm.url, api(receiver))
    yield made.url
    made.server.shutdown()


@pytest.fixture(scope="module")
def router(
    vllm: Vllm, receiver: Receiver, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The real vllm-router."""
    binary = shutil.which("vllm-router", path=str(Path(sys.executable).parent))
    if binary is None:
        pytest.skip("vllm-router is not installed")
    port, metrics = free_port(), free_port()
    command = [
        binary, "--vllm-pd-disaggregation", "--prefill", vllm.url, "--decode", api(receiver),
        "--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics),
        "--policy", "round_robin",
    ]  # fmt: skip
    server = Server(command, tmp_path_factory.mktemp("router") / "router.log")
    try:
        server.wait_healthy(f"http://127.0.0.1:{port}/health", 60)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stop()


def ids(length: int, seed: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(20, 49000) for _ in range(length)]


@pytest.mark.parametrize("way", ["proxy", "router"])
def test_the_text_is_that_of_either_alone(
    way: str, vllm: Vllm, receiver: Receiver, request: pytest.FixtureRequest
) -> None:
    base: str = request.getfixturevalue(way)
    words = ["tell", "me", "about", "the", "sea", "ships", "on", "it", "and", "those", "who"]
    seed = random.Random(way)
    long = " ".join(seed.choice(words) for _ in range(160))
    prompts = ["Hi", f"{way}: the capital of France is", long]
    prompts += [long, f"{long} and more of it", f"{long[:620]} then another way"]  # prefix hits
    cached = []
    for prompt in prompts:
        before = decoded(receiver), kv_bytes(receiver)
        got = ask(base, prompt=prompt)
        assert decoded(receiver) - before[0] == TOKENS - 1, "P's first token was not sampled again"
        assert kv_bytes(receiver) > before[1], "the KV came from P"
        p_alone = ask(vllm.url, prompt=prompt)
        d_alone = ask(api(receiver), prompt=prompt, model=None)
        assert text(got) == text(p_alone) == text(d_alone), prompt
        assert got["usage"]["prompt_tokens"] == p_alone["usage"]["prompt_tokens"]
        assert got["usage"]["completion_tokens"] == TOKENS
        # The router may report P's details rather than D's.
        cached.append((got["usage"]["prompt_tokens_details"] or {}).get("cached_tokens"))
    if way == "proxy":
        assert cached[:3] == [0, 0, 0] and all(cached[3:])


@pytest.mark.parametrize("way", ["proxy", "router"])
def test_chats_streams_and_stop_strings(
    way: str, vllm: Vllm, receiver: Receiver, request: pytest.FixtureRequest
) -> None:
    base: str = request.getfixturevalue(way)
    messages = [{"role": "user", "content": f"What do you think of a {way}?"}]
    expected = text(ask(vllm.url, "chat/completions", messages=messages))
    assert text(ask(base, "chat/completions", messages=messages)) == expected
    stop = expected[12:16]
    got = ask(base, "chat/completions", messages=messages, stop=stop)
    assert text(got) == expected[: expected.index(stop)]
    assert got["choices"][0]["stop_reason"] == stop
    if way == "router":  # the 20-line proxy does not stream
        body = {"model": "m", "messages": messages, "max_tokens": TOKENS, "temperature": 0,
                "ignore_eos": True, "stream": True}  # fmt: skip
        shown = ""
        with httpx.stream("POST", f"{base}/v1/chat/completions", json=body, timeout=60) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    chunk = httpx.Response(200, content=line[6:].encode()).json()
                    shown += chunk["choices"][0]["delta"].get("content") or ""
            assert line == "" or line == "data: [DONE]"
        assert shown == expected


def for_agents(path: str, said: str) -> dict[str, Any]:
    """A request to one of the APIs that agents speak."""
    if path == "responses":
        return {"input": said, "max_output_tokens": TOKENS}
    return {"messages": [{"role": "user", "content": said}]}


@pytest.mark.parametrize("path", ["responses", "messages"])
def test_responses_and_messages(path: str, proxy: str, vllm: Vllm, receiver: Receiver) -> None:
    fields = for_agents(path, f"What do agents think of {path}?")
    before = decoded(receiver), kv_bytes(receiver)
    got = ask(proxy, path, **fields)
    assert decoded(receiver) - before[0] == TOKENS - 1, "P's first token was not sampled again"
    assert kv_bytes(receiver) > before[1], "the KV came from P"
    p_alone, d_alone = ask(vllm.url, path, **fields), ask(api(receiver), path, model=None, **fields)
    assert text(got) == text(p_alone) == text(d_alone)
    assert got["usage"]["output_tokens"] == TOKENS


def test_token_ids_and_log_probabilities(proxy: str, vllm: Vllm, tiny_llama_path: Path) -> None:
    prompt = ids(150, 3)
    (expected,) = greedy(tiny_llama_path, [prompt], TOKENS)
    got = ask(proxy, prompt=prompt, return_token_ids=True, logprobs=2)["choices"][0]
    alone = ask(vllm.url, prompt=prompt, return_token_ids=True, logprobs=2)["choices"][0]
    assert got["token_ids"] == expected
    assert got["logprobs"]["tokens"] == alone["logprobs"]["tokens"]
    values = [got["logprobs"]["token_logprobs"], alone["logprobs"]["token_logprobs"]]
    assert values[0] == pytest.approx(values[1], abs=1e-3)


def test_what_the_prefill_answers(vllm: Vllm, receiver: Receiver) -> None:
    prompt = ids(40, 4)
    body = {"prompt": prompt, "max_tokens": 1, "kv_transfer_params": PREFILL}
    receiver.assert_idle()
    params = ask(vllm.url, **body)["kv_transfer_params"]
    assert params["do_remote_prefill"] is True and params["do_remote_decode"] is False
    assert params["remote_engine_id"]
    ours = params["mac_decode"]
    assert ours["prompt_token_ids"] == prompt
    assert ours["session"] is not None
    assert eventually(lambda: receiver.health()["sessions"] == 1, 20, 0.05)
    d_body = {"prompt": prompt, "return_token_ids": True, "kv_transfer_params": params}
    got = ask(api(receiver), **d_body)["choices"][0]["token_ids"]
    assert got[0] == ours["first_token"]
    receiver.assert_idle()
    # A second request with the same parameters finds no session, and completes all the same.
    assert ask(api(receiver), **d_body)["choices"][0]["token_ids"] == got
    # More than one token is not a router's prefill: vLLM answers it by itself.
    assert ask(vllm.url, **body | {"max_tokens": 3}).get("kv_transfer_params") is None


@pytest.fixture(scope="module")
def front_door(
    vllm: Vllm, receiver: Receiver, tiny_llama_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """The pair's receiver, started anew with vLLM behind its API."""
    receiver.server.stop()
    args = ("--prefill", vllm.url, "--prefill-min-tokens", "64", "--prefill-timeout", "15")
    again = start_receiver(
        tiny_llama_path,
        tmp_path_factory.mktemp("front-door") / "receiver.log",
        port=receiver.port,
        http_port=receiver.http_port,
        args=args,
    )
    receiver.server = again.server
    vllm.wait_connected(receiver)
    return api(receiver)


def paths(receiver: Receiver) -> list[float]:
    name = "mlx_receiver_frontdoor_requests_total"
    return [metric(api(receiver), name, path=path) for path in ("local", "remote", "fallback")]


@pytest.mark.parametrize("path", ["responses", "messages"])
def test_the_front_door_for_agents(
    path: str, front_door: str, vllm: Vllm, receiver: Receiver, tiny_llama_path: Path
) -> None:
    said = "Tell me of harbours, and of the ships in them. " * 20
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_path)
    chat = [{"role": "user", "content": said}]
    written = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer.encode(written, add_special_tokens=False)
    (expected,) = greedy(tiny_llama_path, [prompt], TOKENS)
    before, tokens = paths(receiver), decoded(receiver)
    got = ask(front_door, path, model=None, **for_agents(path, said))
    assert text(got) == tokenizer.decode(expected)
    assert [n - b for n, b in zip(paths(receiver), before, strict=True)] == [0, 1, 0]
    assert decoded(receiver) - tokens == TOKENS - 1
    # The second time vLLM finds the prompt in its prefix cache, and both APIs say so.
    usage = ask(front_door, path, model=None, **for_agents(path, said))["usage"]
    cached = (
        usage["input_tokens_details"]["cached_tokens"]
        if path == "responses"
        else usage["cache_read_input_tokens"]
    )
    assert cached >= 128


def test_the_front_door(
    front_door: str, vllm: Vllm, receiver: Receiver, tiny_llama_path: Path
) -> None:
    short, long = ids(20, 5), ids(300, 6)
    expected = greedy(tiny_llama_path, [short, long, long + short], TOKENS)
    before, tokens = paths(receiver), decoded(receiver)
    for prompt, wanted in zip((short, long, long + short), expected, strict=True):
        got = ask(front_door, model=None, prompt=prompt, return_token_ids=True)
        assert got["choices"][0]["token_ids"] == wanted
    assert [n - b for n, b in zip(paths(receiver), before, strict=True)] == [1, 2, 0]
    assert decoded(receiver) - tokens == TOKENS + 2 * (TOKENS - 1)
    assert got["usage"]["prompt_tokens_details"]["cached_tokens"] >= 256
    vllm.server.signal(signal.SIGSTOP)
    try:
        got = ask(front_door, model=None, prompt=long, return_token_ids=True)
    finally:
        vllm.server.signal(signal.SIGCONT)
    assert got["choices"][0]["token_ids"] == expected[1]
    assert [n - b for n, b in zip(paths(receiver), before, strict=True)] == [1, 2, 1]
    vllm.wait_connected(receiver)
