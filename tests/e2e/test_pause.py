"""vLLM pauses, or is asked to stop: responses that the receiver decodes do as vLLM's own do."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests.mlx_alone import greedy
from tests.servers import Receiver, Vllm, pair
from tests.waiting import eventually

pytestmark = pytest.mark.server

PROMPTS = [[7 + 3 * i + seed for i in range(60)] for seed in range(5)]
OUTPUT = 1000  # long enough for what happens meanwhile, on a busy machine


@pytest.fixture(scope="module", params=["always", pytest.param("mac", marks=pytest.mark.slow)])
def offload(request: pytest.FixtureRequest) -> str:
    """The receiver decodes, or does all."""
    chosen: str = request.param
    return chosen


@pytest.fixture(scope="module")
def drained(
    tiny_llama_path: Path, tmp_path_factory: pytest.TempPathFactory, offload: str
) -> Iterator[tuple[Vllm, Receiver]]:
    """A pair whose vLLM lets responses end when it is asked to stop."""
    with pair(
        tiny_llama_path, tmp_path_factory.mktemp("pause"),
        args=("--shutdown-timeout", "60", "--max-num-batched-tokens", "128"),
        env={"VLLM_SERVER_DEV_MODE": "1", "MAC_DECODE_OFFLOAD": offload},
    ) as served:  # fmt: skip
        yield served


@pytest.fixture(scope="module")
def expected(tiny_llama_path: Path) -> list[list[int]]:
    return greedy(tiny_llama_path, PROMPTS, OUTPUT)


@dataclass(eq=False)
class Reader(threading.Thread):
    """Reads a streamed response."""

    vllm: Vllm
    prompt: list[int]
    output: int = OUTPUT
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None

    def __post_init__(self) -> None:
        super().__init__(daemon=True)
        self.start()
        assert eventually(lambda: len(self.tokens) > 20, 30)

    def run(self) -> None:
        body = {"model": "m", "prompt": self.prompt, "max_tokens": self.output, "temperature": 0,
                "ignore_eos": True, "stream": True, "return_token_ids": True}  # fmt: skip
        url = f"{self.vllm.url}/v1/completions"
        with httpx.stream("POST", url, json=body, timeout=120) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    (choice,) = json.loads(line[6:])["choices"]
                    self.tokens += choice["token_ids"] or []
                    self.finish = choice["finish_reason"] or self.finish

    def ended(self) -> list[int]:
        """Every token, once the response is over."""
        self.join(60)
        assert not self.is_alive(), f"{len(self.tokens)} tokens came"
        return self.tokens


def fallbacks(vllm: Vllm, reason: str = "") -> float:
    labels = {"reason": reason} if reason else {}
    return vllm.metric("vllm:mac_decode_fallbacks_total", **labels)


def post(vllm: Vllm, path: str, body: dict[str, str] | None = None) -> None:
    httpx.post(f"{vllm.url}{path}", json=body, timeout=60).raise_for_status()


@contextlib.contextmanager
def paused(vllm: Vllm, mode: str) -> Iterator[None]:
    """Pause it; it resumes whatever happens, or every later test would wait for it."""
    post(vllm, f"/pause?mode={mode}")
    try:
        yield
    finally:
        post(vllm, "/resume")


def test_an_idle_engine_hears_that_a_response_has_ended(
    drained: tuple[Vllm, Receiver], expected: list[list[int]], offload: str
) -> None:
    """What it was is counted, although no other request makes vLLM step."""
    vllm, _ = drained
    before = vllm.metric("vllm:mac_decode_tokens_total")
    assert vllm.tokens(PROMPTS[0], 100) == expected[0][:100]
    counted = before + 100 - (offload == "always")
    assert eventually(lambda: vllm.metric("vllm:mac_decode_tokens_total") == counted)
    assert vllm.metric("vllm:kv_cache_usage_perc") == 0


def test_a_pause_that_keeps_responses_holds_them(
    drained: tuple[Vllm, Receiver], expected: list[list[int]]
) -> None:
    vllm, _ = drained
    reader = Reader(vllm, PROMPTS[1])
    with paused(vllm, "keep"):
        held = -1
        while held != len(reader.tokens):  # what was on its way
            held = len(reader.tokens)
            time.sleep(1)
        assert held < OUTPUT
    assert reader.ended() == expected[1]
    assert fallbacks(vllm, "paused") == fallbacks(vllm) == 1


def test_a_pause_that_waits_waits_for_the_receiver(
    drained: tuple[Vllm, Receiver], expected: list[list[int]]
) -> None:
    vllm, receiver = drained
    before = fallbacks(vllm)
    reader = Reader(vllm, PROMPTS[2])
    assert eventually(lambda: receiver.health()["decoding"] == 1)
    with paused(vllm, "wait"):
        assert receiver.health()["decoding"] == 0, "the pause was over before the response"
    assert reader.ended() == expected[2]
    assert fallbacks(vllm) == before


def test_a_pause_that_aborts_ends_the_receivers_responses(
    drained: tuple[Vllm, Receiver], expected: list[list[int]]
) -> None:
    vllm, receiver = drained
    before = fallbacks(vllm)
    reader = Reader(vllm, PROMPTS[3])
    with paused(vllm, "abort"):
        tokens = reader.ended()
        assert reader.finish == "abort"
        assert tokens == expected[3][: len(tokens)] and len(tokens) < OUTPUT
        receiver.assert_idle(5)
    vllm.wait_connected(receiver)
    assert fallbacks(vllm) == before


def test_an_abort_during_prefill_frees_the_receiver(drained: tuple[Vllm, Receiver]) -> None:
    """One HTTP request with many prompts: vLLM holds what arrives later until it resumes."""
    vllm, receiver = drained
    prompts = [[11 + i + seed for i in range(1500)] for seed in range(16)]
    body = {"model": "m", "prompt": prompts, "max_tokens": 500, "ignore_eos": True}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, f"{vllm.url}/v1/completions", json=body, timeout=120)
        assert eventually(lambda: receiver.health()["sessions"], 20, 0.01)
        with paused(vllm, "abort"):
            choices = answer.result(60).json()["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["abort"] * len(prompts)
    receiver.assert_idle(5)


def test_weights_that_the_receiver_does_not_have_keep_requests_local(
    drained: tuple[Vllm, Receiver], expected: list[list[int]]
) -> None:
    vllm, _ = drained
    if httpx.get(f"{vllm.url}/weight_info").status_code != 200:
        pytest.skip("this vLLM has no weight versions")
    before = vllm.metric("vllm:mac_decode_local_total", reason="weights_changed")
    post(vllm, "/update_weight_version", {"new_version": "2"})
    assert vllm.tokens(PROMPTS[4], 40) == expected[4][:40]
    post(vllm, "/update_weight_version", {"new_version": "default"})
    assert vllm.tokens(PROMPTS[4], 40) == expected[4][:40]
    assert vllm.metric("vllm:mac_decode_local_total", reason="weights_changed") == before + 1


@pytest.mark.timeout(180)
def test_a_vllm_that_stops_lets_every_response_end(
    drained: tuple[Vllm, Receiver], expected: list[list[int]]
) -> None:
    """Also if the receiver dies meanwhile. Comes last: the vLLM is gone then."""
    vllm, receiver = drained
    readers = [Reader(vllm, prompt, 400) for prompt in PROMPTS]
    vllm.server.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    receiver.server.signal(signal.SIGKILL)
    assert [reader.ended() for reader in readers] == [tokens[:400] for tokens in expected]
    assert vllm.server.process.wait(30) == 0
