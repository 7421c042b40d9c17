"""A receiver that breaks every promise: all responses are right, and vLLM lives."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.conftest import free_port
from tests.lying_receiver import CONTEXT
from tests.servers import Server, Vllm, metric, start_vllm
from tests.waiting import eventually
from tests.warm import RECEIVER

pytestmark = pytest.mark.server

OUTPUT = 12

#: Why the response goes on locally, by lie; "" where it does not.
PROTOCOL = "failed_protocol"
CAUSES = {
    "honest": "",
    "queues_a_while": "",
    "context_is_full": "context",
    "beyond_the_limit": PROTOCOL,
    "silent_at_the_limit": PROTOCOL,
    "wrong_position": PROTOCOL,
    "same_position": PROTOCOL,
    "empty_steps": PROTOCOL,
    "stops_without_reason": PROTOCOL,
    "invented_stop_reason": PROTOCOL,
    "early_length": PROTOCOL,
    "unasked_logprobs": PROTOCOL,
    "two_parts_of_a_step": PROTOCOL,
    "before_start": PROTOCOL,
    "opened_twice": PROTOCOL,
    "completes_unopened": PROTOCOL,
    "invented_bytes": PROTOCOL,
    "refuses_late": PROTOCOL,
    "shrinks": PROTOCOL,
    "fails": "failed_internal",
    "creeps": "stalled",
    "counts_tokens": "stalled",
    "queues": "queued",
    "queues_off_and_on": "stalled",
}
#: These end the connection, and so every hand-off.
LOST = ("token_beyond_the_vocabulary", "not_a_message", "several_parts")
BESIDE = 6  # honest sessions beside all those


@dataclass
class Liar:
    """A vLLM, its right answers, and its receiver."""

    vllm: Vllm
    server: Server
    answers: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)

    def ask(self, name: str) -> list[int]:
        prompt, tokens = self.answers[name]
        choice = self.vllm.complete(prompt, len(tokens), ignore_eos=True)["choices"][0]
        assert choice["finish_reason"] == "length"
        assert choice["stop_reason"] is None
        return choice["token_ids"]

    def ask_together(self, names: list[str]) -> dict[str, list[int]]:
        """In one request: vLLM decides on all before the first can fail."""
        prompts = [self.answers[name][0] for name in names]
        choices = self.vllm.complete(prompts, OUTPUT, ignore_eos=True)["choices"]
        assert {choice["finish_reason"] for choice in choices} == {"length"}
        return {name: c["token_ids"] for name, c in zip(names, choices, strict=True)}

    def fallbacks(self, reason: str) -> float:
        return self.vllm.metric("vllm:mac_decode_fallbacks_total", reason=reason)

    def local(self, reason: str) -> float:
        return self.vllm.metric("vllm:mac_decode_local_total", reason=reason)


@pytest.fixture(scope="module")
def liar(tiny_llama_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Liar]:
    """Answered by vLLM alone first: the receiver comes later."""
    logs = tmp_path_factory.mktemp("liar")
    port = free_port()
    vllm = start_vllm(
        tiny_llama_path,
        logs / "vllm.log",
        receiver=f"127.0.0.1:{port}",
        env={"MAC_DECODE_STALL_TIMEOUT": "3", "MAC_DECODE_QUEUE_TIMEOUT": "6"},
    )
    source = random.Random(23)
    try:
        answers = {}
        names = [*CAUSES, *LOST, *(f"honest {i}" for i in range(BESIDE)), "long", "honest again"]
        for name in names:
            length, output = source.randrange(9, 60), OUTPUT
            if name == "context_is_full":
                length = CONTEXT - 8
            elif name == "long":
                length = CONTEXT - 1
            elif name.startswith("honest "):
                output = 200
            prompt = [source.randrange(20, 49000) for _ in range(length)]
            answers[name] = (prompt, vllm.tokens(prompt, output))
        known = logs / "answers.json"
        known.write_text(json.dumps([(n.split()[0], *a) for n, a in answers.items()]))
        command = [sys.executable, "-m", "tests.lying_receiver", str(port), str(tiny_llama_path)]
        command += [str(known), "--hold", "0.7"]
        server = Server(command, logs / "liar.log", imported=RECEIVER)
        try:
            found = Liar(vllm, server, answers)
            connected(found)
            yield found
        finally:
            server.stop()
    finally:
        vllm.server.stop()


def connected(liar: Liar) -> None:
    """Wait until requests are handed off (again)."""

    def handed_off() -> bool:
        before = liar.vllm.metric("vllm:mac_decode_tokens_total")
        assert liar.ask("honest") == liar.answers["honest"][1]
        liar.vllm.tokens([5, 6, 7], 1)
        return liar.vllm.metric("vllm:mac_decode_tokens_total") > before

    assert eventually(handed_off, 40, 0.3), liar.vllm.server.tail() + liar.server.tail()


def test_every_lie_at_once_beside_honest_sessions(liar: Liar) -> None:
    causes = {cause for cause in CAUSES.values() if cause}
    before = {cause: liar.fallbacks(cause) for cause in causes}
    beside = [f"honest {i}" for i in range(BESIDE)]
    with ThreadPoolExecutor(BESIDE) as pool:
        honest = [pool.submit(liar.ask, name) for name in beside]
        answers = liar.ask_together(list(CAUSES))
        assert answers == {name: liar.answers[name][1] for name in CAUSES}
        assert [one.result() for one in honest] == [liar.answers[name][1] for name in beside]
    liar.vllm.tokens([5, 6, 7], 1)
    seen = {cause: liar.fallbacks(cause) - before[cause] for cause in causes}
    assert seen == {cause: list(CAUSES.values()).count(cause) for cause in causes}
    log = liar.vllm.server.log.read_text()
    lines = [line for line in log.splitlines() if "broke the protocol" in line]
    said = len(lines) + sum(map(int, re.findall(r"and (\d+) more like it", "\n".join(lines))))
    assert 1 <= len(lines) <= said <= seen[PROTOCOL]
    assert "INFO all is well" not in log
    assert "Traceback" not in log
    assert metric(liar.vllm.url, "vllm:num_requests_running") == 0


def test_prompts_that_do_not_fit_the_receiver_stay_local(liar: Liar) -> None:
    connected(liar)  # the circuit is closed again
    before = liar.local("receiver_context")
    assert liar.ask("long") == liar.answers["long"][1]
    assert liar.local("receiver_context") == before + 1


def test_responses_elsewhere_count_as_running(liar: Liar) -> None:
    connected(liar)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(liar.ask, "honest again")
        running = "vllm:num_requests_running"
        assert eventually(lambda: metric(liar.vllm.url, running) == 1)
        assert eventually(lambda: metric(liar.vllm.url, "vllm:kv_cache_usage_perc") == 0)
        assert metric(liar.vllm.url, running) == 1
        assert not answer.done()
        assert answer.result() == liar.answers["honest again"][1]
    assert eventually(lambda: metric(liar.vllm.url, running) == 0)


@pytest.mark.parametrize("lie", LOST)
def test_what_is_no_message_ends_the_connection(liar: Liar, lie: str) -> None:
    connected(liar)
    before = liar.fallbacks("lost")
    with ThreadPoolExecutor(2) as pool:
        beside = pool.submit(liar.ask, "honest 0")
        assert liar.ask(lie) == liar.answers[lie][1]
        assert beside.result() == liar.answers["honest 0"][1]
    liar.vllm.tokens([5, 6, 7], 1)
    assert liar.fallbacks("lost") == before + 2
    assert "lost the receiver" in liar.vllm.server.tail()
