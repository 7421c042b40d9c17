"""The front door: long prompts go to a vLLM, played by the hand-written client."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from mlx_receiver.http.openai import prefill as api_prefill
from mlx_receiver.receiver import Receiver
from mlx_receiver.settings import Settings, SettingsError
from tests.conftest import free_port
from tests.mlx_receiver.client import HERE, connected
from tests.mlx_receiver.conftest import Prefill
from tests.mlx_receiver.http.test_api_claims import leave_unclaimed, params
from tests.mlx_receiver.http.test_http import url, values

PAUSE = 0.5

Answer = Callable[[dict[str, Any]], tuple[int, dict[str, Any]]]


class PrefillServer:
    """The HTTP side of a vLLM: a model list, and whatever ``answer`` makes of a prompt."""

    def __init__(self, port: int) -> None:
        self.requests: list[dict[str, Any]] = []
        self.answer: Answer = lambda body: (500, {"error": {"message": "not now"}})
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send(200, {"data": [{"id": "spark's name"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(body | {"authorization": self.headers["Authorization"]})
                self.send(*outer.answer(body))

            def send(self, status: int, content: dict[str, Any]) -> None:
                raw = json.dumps(content).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(raw)))
                    self.end_headers()
                    self.wfile.write(raw)
                except OSError:
                    pass  # the receiver did not wait

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def address() -> tuple[str, int]:
    port = free_port()
    return f"http://127.0.0.1:{port}", port


@pytest.fixture(scope="module")
def door(tiny_llama_path: Path, address: tuple[str, int]) -> Iterator[Receiver]:
    settings = Settings(
        model=str(tiny_llama_path), **HERE, port=0, http_port=0, prefill=address[0],
        prefill_min_tokens=30, prefill_timeout=5, prefill_api_key="spark's key",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, Receiver(settings) as started:
        patch.setattr(api_prefill, "_PAUSE_SECONDS", PAUSE)
        yield started


@pytest.fixture
def vllm(address: tuple[str, int]) -> Iterator[PrefillServer]:
    made = PrefillServer(address[1])
    yield made
    made.server.shutdown()
    made.server.server_close()


def ask(door: Receiver, prompt: list[int], **fields: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True} | fields  # fmt: skip
    answer = httpx.post(url(door, "/v1/completions"), json=body, timeout=30)
    assert answer.status_code == 200, answer.text
    return answer.json()


def taken(door: Receiver) -> dict[str, float]:
    found = values(door)
    return {
        path: found.get(f"mlx_receiver_frontdoor_requests_total[{path}]", 0.0)
        for path in ("local", "remote", "fallback")
    }


def grown(door: Receiver, before: dict[str, float]) -> dict[str, float]:
    return {path: count for path, n in taken(door).items() if (count := n - before[path])}


def test_long_prompts_are_prefilled_by_vllm_and_short_ones_here(
    door: Receiver, vllm: PrefillServer, prefill: Prefill
) -> None:
    kv, short = prefill(33), prefill(20)
    before = taken(door)
    with connected(door) as client:

        def answer(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
            assert body["prompt"] == kv.prompt
            cached = {"remote_prefill_cached_tokens": 16}
            return 200, {"kv_transfer_params": params(kv, leave_unclaimed(client, kv)) | cached}

        vllm.answer = answer
        got = ask(door, kv.prompt, min_tokens=2, top_k=5)
    assert got["choices"][0]["token_ids"] == kv.tokens
    assert got["usage"]["prompt_tokens_details"]["cached_tokens"] == 16
    (asked,) = vllm.requests
    assert asked["model"] == "spark's name" and asked["authorization"] == "Bearer spark's key"
    assert (asked["max_tokens"], asked["min_tokens"], asked["top_k"]) == (1, 1, 5)
    assert asked["ignore_eos"] and asked["kv_transfer_params"]["do_remote_decode"] is True
    assert ask(door, short.prompt)["choices"][0]["token_ids"] == short.tokens
    assert len(vllm.requests) == 1
    assert grown(door, before) == {"local": 1, "remote": 1}


def _slow(_body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    time.sleep(8)
    return 200, {}


@pytest.mark.parametrize(
    "answer",
    [
        lambda body: (500, {"error": {"message": "out of memory"}}),
        lambda body: (200, {"kv_transfer_params": None}),
        lambda body: (200, {"kv_transfer_params": {"mac_decode": {"first_token": 1}}}),
        _slow,
    ],
    ids=["an error", "no connector", "nonsense", "slow"],
)
def test_what_vllm_cannot_do_is_done_here(
    door: Receiver, vllm: PrefillServer, prefill: Prefill, answer: Answer
) -> None:
    kv, before = prefill(33), taken(door)
    vllm.answer = answer
    assert ask(door, kv.prompt)["choices"][0]["token_ids"] == kv.tokens
    assert len(vllm.requests) == 1
    assert grown(door, before) == {"fallback": 1}


def test_a_session_that_was_never_opened_here(
    door: Receiver, vllm: PrefillServer, prefill: Prefill
) -> None:
    kv = prefill(33)
    _wait_for_another_try(door)
    before = taken(door)
    vllm.answer = lambda body: (200, {"kv_transfer_params": params(kv, 99)})
    assert ask(door, kv.prompt)["choices"][0]["token_ids"] == kv.tokens
    assert grown(door, before) == {"fallback": 1}


def test_vllm_is_gone(door: Receiver, prefill: Prefill) -> None:
    kv = prefill(33)
    _wait_for_another_try(door)
    before = taken(door)
    began = time.monotonic()
    for _ in range(2):
        assert ask(door, kv.prompt)["choices"][0]["token_ids"] == kv.tokens
    assert time.monotonic() - began < 10
    assert grown(door, before) == {"fallback": 2}


def test_settings_that_cannot_work() -> None:
    with pytest.raises(SettingsError, match="--prefill"):
        Settings(model="m", prefill="spark:8000").check()
    with pytest.raises(SettingsError, match="--http-port"):
        Settings(model="m", prefill="http://spark:8000", http_port=None).check()


def _wait_for_another_try(door: Receiver) -> None:
    """Let the pause after a failed connection pass."""
    time.sleep(PAUSE + 0.1)
