"""What pages of other sites, other machines and clients without the key get to see: nothing."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from mlx_receiver.receiver import Receiver
from mlx_receiver.settings import Settings
from tests.mlx_receiver.http.test_http import url

BODY = {"prompt": "x", "max_tokens": 1}
PATHS = ("/health", "/metrics", "/handoffs", "/handoffs/x", "/v1/models", "/nowhere")
KEY = {"Authorization": "Bearer sesame"}


@pytest.fixture(scope="module")
def exposed(tiny_llama_path: Path) -> Iterator[str]:
    """The base URL of a receiver that other machines can reach."""
    settings = Settings(
        model=str(tiny_llama_path), host="0.0.0.0", port=0, http_port=0, token="t" * 32,
        discovery=False, api_key="sesame", allowed_hosts="studio.lan, other.lan",
    )  # fmt: skip
    with Receiver(settings) as started:
        yield url(started, "")


def test_strangers_learn_that_it_works(exposed: str) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "sesame"}):
        assert httpx.get(f"{exposed}/health", headers=headers).json() == {"status": "ok"}
        for path in PATHS[1:]:
            answer = httpx.get(exposed + path, headers=headers)
            assert answer.status_code == 401, path
            assert answer.json()["error"]["type"] == "AuthenticationError"
    assert "clients" in httpx.get(f"{exposed}/health", headers=KEY).json()
    assert "mlx_receiver" in httpx.get(f"{exposed}/metrics", headers=KEY).text
    assert httpx.get(f"{exposed}/handoffs", headers=KEY).json() == []
    assert httpx.get(f"{exposed}/nowhere", headers=KEY).json()["error"]["code"] == 404
    assert httpx.put(f"{exposed}/v1/models", headers=KEY).json()["error"]["code"] == 405


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("127.0.0.1", True), ("127.0.0.1:7791", True), ("[::1]:7791", True), ("192.168.1.7", True),
        ("localhost", True), ("LOCALHOST:1", True), ("mac-studio.local", True),
        ("studio.lan:7791", True), (socket.gethostname(), True),
        ("evil.example", False), ("localhost.evil.example", False), ("local", False),
        ("evil.example:7791", False), ("127.0.0.1.evil.example", False), ("", False),
        ("[::1", False), ("a@localhost@evil.example", False),
    ],
)  # fmt: skip
def test_only_names_of_this_machine_are_answered(exposed: str, host: str, allowed: bool) -> None:
    for path in PATHS:
        answer = httpx.get(exposed + path, headers={"Host": host, **KEY})
        assert (answer.status_code != 421) == allowed, path
    answer = httpx.post(f"{exposed}/v1/completions", json=BODY, headers={"Host": host, **KEY})
    assert answer.status_code == (200 if allowed else 421)


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({}, True),
        ({"Origin": "http://localhost:7791"}, True),
        ({"Origin": "http://localhost:7791", "Sec-Fetch-Site": "same-origin"}, True),
        ({"Sec-Fetch-Site": "none"}, True),
        ({"Origin": "http://evil.example"}, False),
        ({"Origin": "http://localhost:3000"}, False),
        ({"Origin": "http://localhost"}, False),
        ({"Origin": "null"}, False),
        ({"Origin": ""}, False),
        ({"Origin": "http://[::1"}, False),
        ({"Sec-Fetch-Site": "cross-site"}, False),
        ({"Sec-Fetch-Site": "same-site"}, False),
    ],
)
def test_pages_of_other_sites_are_refused(
    receiver: Receiver, headers: dict[str, str], allowed: bool
) -> None:
    headers = {"Host": "localhost:7791", **headers}
    for path in PATHS:
        assert (httpx.get(url(receiver, path), headers=headers).status_code != 403) == allowed
    answer = httpx.post(url(receiver, "/v1/completions"), json=BODY, headers=headers)
    assert answer.status_code == (200 if allowed else 403)


@pytest.mark.parametrize(
    "kind", ["", "text/plain", "application/x-www-form-urlencoded", "application/jsonp"]
)
def test_only_json_is_read(receiver: Receiver, kind: str) -> None:
    body = b'{"prompt": "x", "max_tokens": 1}'
    target = url(receiver, "/v1/completions")
    answer = httpx.post(target, content=body, headers={"Content-Type": kind} if kind else {})
    assert answer.status_code == 415 and "application/json" in answer.text
    json_kind = {"Content-Type": "application/JSON; charset=utf-8"}
    assert httpx.post(target, content=body, headers=json_kind).status_code == 200


def test_a_template_of_the_clients_own_is_refused(receiver: Receiver) -> None:
    said = {"messages": [{"role": "user", "content": "x"}]}
    for name in ("chat_template", "tokenize", "return_dict"):
        body = said | {"chat_template_kwargs": {name: "x"}}
        answer = httpx.post(url(receiver, "/v1/chat/completions"), json=body)
        assert answer.status_code == 400 and name in answer.text
    answer = httpx.post(url(receiver, "/v1/chat/completions"), json=said | {"chat_template": "x"})
    assert answer.status_code == 400 and "chat_template" in answer.text
