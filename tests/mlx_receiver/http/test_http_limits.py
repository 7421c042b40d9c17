"""A live receiver under requests that mean harm, with a client beside them that must not notice."""

from __future__ import annotations

import json
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from mlx_receiver.decode.model import find_model
from tests.servers import Receiver, start_receiver
from tests.waiting import eventually

pytestmark = pytest.mark.server

PROMPT = "The quick brown fox jumps over"
GREEDY = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
KEY = {"Authorization": "Bearer sesame"}
#: More than mlx-lm lets its process open.
CONNECTIONS = 2100


@pytest.fixture(scope="module")
def live(tiny_llama_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    log = tmp_path_factory.mktemp("limits") / "receiver.log"
    started = start_receiver(tiny_llama_path, log, args=("--api-key", "sesame"))
    try:
        yield started
        assert started.server.process.poll() is None, started.server.tail()
        assert "Traceback" not in started.server.tail(1 << 20)
    finally:
        started.server.stop()


CLIENT = httpx.Client(timeout=60, limits=httpx.Limits(max_keepalive_connections=0))


def post(live: Receiver, path: str, body: bytes | dict[str, Any]) -> httpx.Response:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {**KEY, "Content-Type": "application/json"}
    return CLIENT.post(f"{live.url}/v1/{path}", content=raw, headers=headers)


class Slow(AssertionError):
    """A health check had to wait."""


@contextmanager
def beside(live: Receiver) -> Iterator[None]:
    """Someone else's requests and health checks: right, and answered soon.

    In a process of their own, with nothing but sockets: this one is busy with the attack.
    """
    command = [sys.executable, "-m", "tests.mlx_receiver.bystander", str(live.http_port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == b"quiet\n"
        try:
            yield
        finally:
            process.stdin.close()
            said = json.loads(process.stdout.read())
    assert not said["wrong"], said["wrong"][:3]
    assert said["answers"]
    # Others use these cores, too. A check has to wait its turn four times: here, there and back.
    if said["health"] > 0.1 + said["quiet"] + 4 * said["jitter"]:
        raise Slow(said)


def transfer(**changes: Any) -> dict[str, Any]:
    ours = {"first_token": 5, "prompt_token_ids": [5, 6, 7]} | changes
    return {"kv_transfer_params": {"mac_decode": ours}, "max_tokens": 2}


def nested(depth: int) -> Any:
    found: Any = 1
    for _ in range(depth):
        found = [found]
    return found


#: Numbers that are no token of any vocabulary.
BAD_IDS = [10**9, -1, 32000 * 10**3, 2**31, 2**63, 2**64, 10**30]


@pytest.mark.parametrize("bad", BAD_IDS)
def test_no_number_of_a_body_is_used_as_an_index_unchecked(live: Receiver, bad: int) -> None:
    rows = {"token_ids": [bad], "values": [-1.0], "rank": 1}
    bodies: list[dict[str, Any]] = [
        transfer(first_token=bad),
        transfer(prompt_token_ids=[5, bad]),
        transfer(logprobs=rows) | {"logprobs": 1},
        transfer(session=str(bad)) if bad > 2**63 - 1 or bad < 0 else transfer(first_token=bad),
        {"kv_transfer_params": {"prompt_token_ids": [bad]}},
        {"prompt": [bad]},
        {"prompt": [[5], [5, bad]]},
        {"prompt": PROMPT, "stop_token_ids": [bad], "min_tokens": 1},
        {"prompt": PROMPT, "allowed_token_ids": [5, bad]},
        {"prompt": PROMPT, "logit_bias": {str(bad): 1.0}},
    ]
    for body in bodies:
        answer = post(live, "completions", body)
        assert answer.status_code == 400, (body, answer.text)
        assert answer.json()["error"]["type"] == "BadRequestError"
    assert post(live, "completions", GREEDY).status_code == 200


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt_token_ids": []}, "prompt_token_ids"),
        ({"session": "12a"}, "session"),
        ({"session": "1" * 5000}, "session"),
        ({"first_token": None}, "first_token"),
        ({"logprobs": {"token_ids": [1, 2], "values": [-1.0], "rank": 1}}, "2 tokens and 1 values"),
        ({"logprobs": {"token_ids": [], "values": [], "rank": 1}}, "token_ids"),
        ({"logprobs": {"token_ids": [1] * 50, "values": [-1.0] * 50, "rank": 1}}, "token_ids"),
        ({"logprobs": {"token_ids": [1], "values": [-1.0], "rank": -1}}, "rank"),
    ],
)
def test_a_hand_off_is_read_by_its_types(live: Receiver, changes: Any, said: str) -> None:
    answer = post(live, "completions", transfer(**changes) | {"logprobs": 1})
    assert answer.status_code == 400 and said in answer.text
    assert answer.json()["error"]["param"] == "kv_transfer_params"


WORDS = [f"word{i}" for i in range(10_000)]
LONG_WORDS = [f"{i} " + "x y " * 200 for i in range(99)]
LONG_TEXT = "The quick brown fox. " * 48_000
ATTACKS: dict[str, tuple[str, dict[str, Any]]] = {
    "bad words": ("completions", GREEDY | {"bad_words": WORDS}),
    "bad words in many tokens": ("completions", GREEDY | {"bad_words": LONG_WORDS}),
    "stop strings": ("completions", GREEDY | {"stop": [f"s{i}" for i in range(100_000)]}),
    "long stop string": ("completions", GREEDY | {"stop": "a" * 500_000}),
    "samples": ("completions", GREEDY | {"prompt": ["x"] * 1000, "n": 32, "temperature": 1}),
    "prompts": ("completions", GREEDY | {"prompt": ["x"] * 2000}),
    "a long text": ("completions", GREEDY | {"prompt": LONG_TEXT}),
    "a long prompt": ("completions", GREEDY | {"prompt": [300] * 200_000}),
    "biases": ("completions", GREEDY | {"logit_bias": {str(i): 1 for i in range(30_000)}}),
    "depth": ("completions", GREEDY | {"kv_transfer_params": {"x": nested(900)}}),
    "a conversation": ("chat/completions", {
        "messages": [{"role": "user", "content": "x"}] * 20_000,
    }),
    "a template": ("chat/completions", {
        "messages": [{"role": "user", "content": "x"}],
        "chat_template_kwargs": {"chat_template": "{% for i in range(99999) %}{% for j in range("
                                 "99999) %}{% endfor %}{% endfor %}"},
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_one_client_does_not_slow_down_the_others(live: Receiver, name: str) -> None:
    path, body = ATTACKS[name]
    raw = json.dumps(body).encode()

    def attack() -> list[int]:
        found = []
        until = time.monotonic() + 2.0
        while time.monotonic() < until:
            found.append(post(live, path, raw).status_code)
        return found

    for attempt in range(3):
        try:
            with beside(live), ThreadPoolExecutor(4) as pool:
                tasks = [pool.submit(attack) for _ in range(4)]
                said = {status for task in tasks for status in task.result()}
        except Slow:
            # Once may be the machine's doing, three times is not.
            if attempt == 2:
                raise
        else:
            assert said == {400}
            return


def test_the_tiny_models_body_limit(live: Receiver, tiny_llama_path: Path) -> None:
    assert find_model(str(tiny_llama_path)).max_tokens == 8192
    fits, over = b" " * ((1 << 20) - 20), b" " * (1 << 20)
    assert post(live, "completions", b'{"prompt":' + fits).status_code == 400
    assert post(live, "completions", b'{"prompt":' + over).status_code == 413
    # What is announced is refused before any of it has come.
    with raw_connection(live, b"Content-Length: 99999999999\r\n") as sock:
        assert b" 413 " in sock.recv(4096)
    with raw_connection(live, b"Transfer-Encoding: chunked\r\n") as sock:
        for _ in range(5):
            sock.sendall(b"40000\r\n" + b" " * 0x40000 + b"\r\n")
        assert b" 413 " in sock.recv(4096)


@contextmanager
def raw_connection(live: Receiver, more: bytes = b"", path: str = "completions") -> Iterator[Any]:
    """A POST whose head has been sent."""
    with socket.create_connection(("127.0.0.1", live.http_port), timeout=60) as sock:
        sock.sendall(
            f"POST /v1/{path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer sesame\r\n"
            "Content-Type: application/json\r\n".encode()
            + more
            + b"\r\n"
        )
        yield sock


def test_idle_connections_shut_nobody_out(live: Receiver) -> None:
    idle = []
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 2 * CONNECTIONS), most))
    try:
        with beside(live):
            for _ in range(CONNECTIONS):
                sock = socket.create_connection(("127.0.0.1", live.http_port), timeout=60)
                sock.sendall(b"GET /health HTTP/1.1\r\n")
                idle.append(sock)
                time.sleep(0.001)
            time.sleep(0.5)
    finally:
        for sock in idle:
            sock.close()


def test_a_head_that_never_ends_is_not_waited_for(live: Receiver) -> None:
    with socket.create_connection(("127.0.0.1", live.http_port), timeout=20) as slow:
        began = time.monotonic()
        slow.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        with pytest.raises(OSError):
            while time.monotonic() - began < 15:
                slow.sendall(b"X: y\r\n")
                time.sleep(0.2)
        assert 8 < time.monotonic() - began < 14
    with socket.create_connection(("127.0.0.1", live.http_port), timeout=20) as large:
        large.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 20_000)
        assert large.recv(100).startswith(b"HTTP/1.1 400")


def test_bodies_that_come_slowly_leave_room_for_others(live: Receiver) -> None:
    """Each is kept from its beginning; all of them together have a limit, too."""
    part = b" " * (900 << 10)
    slow = []
    try:
        said = []
        for _ in range(12):
            connection = raw_connection(live, f"Content-Length: {len(part) + 9}\r\n".encode())
            sock = connection.__enter__()
            slow.append(connection)
            sock.sendall(part)
            time.sleep(0.1)
            sock.setblocking(False)
            try:
                said.append(sock.recv(12))
            except BlockingIOError:
                said.append(b"")
        assert said[:8] == [b""] * 8
        assert b"HTTP/1.1 503" in said[8:]
    finally:
        for connection in slow:
            connection.__exit__(None, None, None)
    assert eventually(lambda: post(live, "completions", GREEDY).status_code == 200)


def test_requests_under_way_are_bounded(live: Receiver) -> None:
    body = GREEDY | {"max_tokens": 4000, "n": 128, "temperature": 1}
    raw = json.dumps(body).encode()
    head = f"Content-Length: {len(raw)}\r\n".encode()
    waiting = []
    try:
        for _ in range(8):
            connection = raw_connection(live, head)
            connection.__enter__().sendall(raw)
            waiting.append(connection)
        assert eventually(lambda: sum(map(live.health().get, ("decoding", "waiting"))) >= 1024, 30)
        answer = post(live, "completions", GREEDY)
        assert answer.headers["retry-after"] == "1" and "samples are under way" in answer.text
        assert httpx.get(f"{live.url}/health").status_code == 200
    finally:
        for connection in waiting:
            connection.__exit__(None, None, None)
    assert eventually(lambda: post(live, "completions", GREEDY).status_code == 200, 30)


def test_a_client_that_reads_nothing_is_cut_off(live: Receiver) -> None:
    body = GREEDY | {"max_tokens": 8000, "stream": True, "logprobs": 20, "n": 4, "temperature": 1}
    raw = json.dumps(body).encode()
    with raw_connection(live, f"Content-Length: {len(raw)}\r\n".encode()) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(raw)
        assert eventually(lambda: live.health()["decoding"] == 4, 20)
        began = time.monotonic()
        assert eventually(lambda: live.health()["decoding"] == 0, 60, 0.2)
        assert time.monotonic() - began > 25, "whoever only pauses is waited for"


def test_the_api_key_cannot_be_guessed_quickly(live: Receiver) -> None:
    url = f"{live.url}/v1/models"
    with httpx.Client(timeout=60) as knows:
        assert knows.get(url, headers=KEY).status_code == 200
        said = [
            CLIENT.get(url, headers={"Authorization": f"Bearer {i}"}).status_code for i in range(60)
        ]
        assert said[0] == 401 and said.count(401) < 30 and said[-1] == 429
        # Not even the right one is looked at now, but who has shown it goes on.
        assert httpx.get(url, headers=KEY).status_code == 429
        assert knows.get(url, headers=KEY).status_code == 200
    assert httpx.get(f"{live.url}/health").status_code == 200
    assert eventually(lambda: httpx.get(url, headers=KEY).status_code == 200, 20, 0.5)
