"""An agent's conversation: an OpenAI client with tools, turn after turn, through restarts of either
side and through evictions. Of each turn only what is new is sent, and every answer is the
receiver's own."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from mlx_receiver.sessions.disk import BLOCK
from tests.servers import Receiver, Vllm, pair, start_receiver, start_vllm
from tests.waiting import eventually

pytestmark = pytest.mark.server

#: SmolLM2-135M's K and V of a token: 30 layers, 3 heads of 64, fp32.
TOKEN_BYTES = 2 * 30 * 3 * 64 * 4

#: Room for one conversation with what it may decode, and little beside it.
RECEIVER_ARGS = ("--kv-memory", "88MB")

ANSWER = 6

#: The loop adds tool calls itself, in the history as in real ones: so small a model calls none.
VLLM_ARGS = (
    "--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--enable-prompt-tokens-details",
    "--chat-template", str(Path(__file__).with_name("tools.jinja")),
)  # fmt: skip

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": what,
            "parameters": {
                "type": "object",
                "properties": {"path": {"type": "string"}},
                "required": ["path"],
            },
        },
    }
    for name, what in (("read", "A file's text."), ("test", "Runs a file's tests."))
]

WORDS = ("the", "parser", "reads", "a", "token", "from", "file", "and", "returns", "error", "line")


@dataclass
class Agent:
    """One conversation; what it says beside the model's answers depends on its seed alone.
    ``words``: of its system prompt."""

    seed: int
    words: int = 8
    messages: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        beginning = f"You repair programs ({self.seed}). {self._text(self.words)}"
        self.messages += [
            {"role": "system", "content": beginning},
            {"role": "user", "content": f"Find out why this fails: {self._text(8)}"},
        ]

    def go_on(self, answer: str, edited: bool = False) -> None:
        """The answer with a tool call behind it, and what the tool gave. ``edited``: the answer
        is not what was said, as where a template strips an earlier answer's reasoning."""
        name = self._random.choice(TOOLS)["function"]["name"]
        call = {
            "id": f"call_{len(self.messages)}",
            "type": "function",
            "function": {
                "name": name,
                "arguments": f'{{"path": "{self._random.choice(WORDS)}.py"}}',
            },
        }
        said = "It was read." if edited else answer
        self.messages += [
            {"role": "assistant", "content": said, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call["id"], "content": self._text(10)},
        ]

    def _text(self, words: int) -> str:
        return " ".join(self._random.choice(WORDS) for _ in range(words))


@dataclass(frozen=True)
class Turn:
    """One answer, and how it came about."""

    prompt: list[int]
    tokens: list[int]
    text: str
    held: int

    @property
    def whole(self) -> list[int]:
        """What the receiver may keep of it."""
        return self.prompt + self.tokens


class Desk:
    """The two servers, and every turn that went through them."""

    def __init__(self, model: Path, logs: Path, vllm: Vllm, receiver: Receiver) -> None:
        self._model, self._logs = model, logs
        self.vllm, self.receiver = vllm, receiver
        self.turns: list[Turn] = []

    def ask(self, agent: Agent, answer_tokens: int = ANSWER) -> Turn:
        """The agent's next answer, which the receiver decoded; what was not held of its prompt,
        and no more, was sent."""
        with openai.OpenAI(base_url=f"{self.vllm.url}/v1", api_key="none", max_retries=0) as client:
            answer = client.chat.completions.create(
                model="m",
                messages=agent.messages,  # type: ignore[arg-type]
                tools=TOOLS,  # type: ignore[arg-type]
                max_tokens=answer_tokens,
                temperature=0,
                extra_body={"return_token_ids": True, "ignore_eos": True},
            ).model_dump()
        choice, prompt = answer["choices"][0], answer["prompt_token_ids"]
        assert (choice["finish_reason"], len(choice["token_ids"])) == ("length", answer_tokens)
        assert eventually(lambda: self._handoff(answer["id"]) is not None)
        handoff = self._handoff(answer["id"])
        assert handoff is not None
        assert (handoff["outcome"], handoff["output_tokens"]) == ("finished", answer_tokens)
        held = handoff["held_tokens"]
        assert handoff["kv_bytes"] == TOKEN_BYTES * (len(prompt) - held)
        turn = Turn(prompt, choice["token_ids"], choice["message"]["content"], held)
        self.turns.append(turn)
        return turn

    def settle(self) -> None:
        """What the texts leave is kept a moment after their ends."""
        self.receiver.assert_idle()

    def restart_receiver(self, *args: str) -> None:
        """End it, and start another one at the same address, with these arguments, too."""
        old = self.receiver
        old.server.stop()
        log = self._logs / "receiver-again.log"
        self.receiver = start_receiver(
            self._model,
            log,
            port=old.port,
            http_port=old.http_port,
            args=(*RECEIVER_ARGS, *args),
        )
        self.vllm.wait_connected(self.receiver, 60)

    def restart_vllm(self) -> None:
        """End it, and start another one."""
        self.vllm.server.stop()
        log, address = self._logs / "vllm-again.log", self.receiver.address
        self.vllm = start_vllm(self._model, log, receiver=address, args=VLLM_ARGS)
        self.vllm.wait_connected(self.receiver, 60)

    def cold(self, turn: Turn) -> tuple[list[int], str]:
        """The receiver's answer to the same tokens, all of which it computes itself."""
        length = len(turn.tokens)
        body = {"prompt": turn.prompt, "max_tokens": length, "temperature": 0, "ignore_eos": True,
                "return_token_ids": True, "cache_salt": f"cold {uuid.uuid4()}"}  # fmt: skip
        self.settle()  # there is no room for both
        response = httpx.post(f"{self.receiver.url}/v1/completions", json=body, timeout=120)
        assert response.status_code == 200, response.text
        answer = response.json()
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        return answer["choices"][0]["token_ids"], answer["choices"][0]["text"]

    def evicted(self) -> float:
        """Texts that have made room."""
        return self.receiver.metric("mlx_receiver_evicted_texts_total")

    def on_disk(self) -> float:
        """Bytes of what texts have left there."""
        return self.receiver.metric("mlx_receiver_kv_disk_bytes")

    def _handoff(self, response: str) -> dict[str, Any] | None:
        known = httpx.get(f"{self.receiver.url}/handoffs").json()
        return next((h for h in known if response in h["request_id"] and h["ended_ns"]), None)


def common(one: list[int], other: list[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


@pytest.fixture(scope="module")
def desk(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """The servers of all tests here."""
    logs = tmp_path_factory.mktemp("agent")
    with pair(smollm2, logs, args=VLLM_ARGS, receiver_args=RECEIVER_ARGS) as (vllm, receiver):
        made = Desk(smollm2, logs, vllm, receiver)
        try:
            yield made
        finally:  # the pair's own are stopped by it
            made.vllm.server.stop()
            made.receiver.server.stop()


def test_an_agent_sends_only_what_is_new(desk: Desk) -> None:
    agent = Agent(1)

    def following(before: Turn, edited: bool = False) -> Turn:
        """The turn after that one, of which all is held that it shares with it."""
        agent.go_on(before.text, edited)
        desk.settle()
        turn = desk.ask(agent)
        shared = common(before.whole, turn.prompt)
        assert turn.held == shared
        # The template writes the answer as it was said, unless that was edited.
        assert edited or shared >= len(before.prompt) + ANSWER - 2
        return turn

    turn = desk.ask(agent)
    assert turn.held == 0
    turn = following(following(turn))

    desk.restart_receiver()
    agent.go_on(turn.text)
    turn = desk.ask(agent)  # the fourth: nothing is left
    assert turn.held == 0
    turn = following(turn)
    turn = following(turn, edited=True)

    desk.restart_vllm()
    assert desk.receiver.health()["kv_resident_bytes"] > 0
    turn = following(turn)  # the seventh, of another vLLM
    assert turn.held > len(desk.turns[-2].prompt)

    before = desk.evicted()
    with ThreadPoolExecutor() as pool:
        others = list(pool.map(desk.ask, [Agent(seed) for seed in range(2, 7)]))
    assert all(other.held == 0 for other in others)
    assert desk.evicted() > before
    agent.go_on(turn.text)
    desk.settle()
    turn = desk.ask(agent)  # the eighth
    assert turn.held == 0
    turn = following(following(turn))

    assert len(desk.turns) == 10 + len(others)
    for past in desk.turns:
        assert (past.tokens, past.text) == desk.cold(past)


def test_a_restarted_receiver_continues_from_disk(desk: Desk, tmp_path: Path) -> None:
    disk = ("--kv-disk", str(tmp_path))
    desk.restart_receiver(*disk)
    agent = Agent(7, words=520)
    first = desk.ask(agent)
    assert first.held == 0
    written = len(first.whole) // BLOCK * BLOCK
    assert written >= 2 * BLOCK
    assert eventually(lambda: desk.on_disk() >= TOKEN_BYTES * written)

    desk.restart_receiver(*disk)
    agent.go_on(first.text)
    second = desk.ask(agent)  # which sends no more than what is not in these blocks
    assert second.held == common(first.whole, second.prompt) // BLOCK * BLOCK >= 2 * BLOCK
    agent.go_on(second.text)
    desk.settle()
    third = desk.ask(agent)  # what came from the disk is in memory
    assert third.held == common(second.whole, third.prompt)
    for past in (first, second, third):
        assert (past.tokens, past.text) == desk.cold(past)


def test_a_branch_begins_like_what_is_still_decoded(desk: Desk) -> None:
    """Another agent with the same instructions, asked while the first one answers."""
    first, branch = Agent(8, words=200), Agent(8, words=200)
    branch.messages[1] = {"role": "user", "content": "Write a test for it."}
    desk.settle()
    with ThreadPoolExecutor(1) as pool:
        answering = pool.submit(desk.ask, first, 250)
        assert eventually(lambda: desk.receiver.health()["decoding"] > 0, 60)
        turn = desk.ask(branch)
        assert not answering.done(), "the first one's answer must be longer"
        other = answering.result()
    assert turn.held == common(other.prompt, turn.prompt) > 200
    for past in (other, turn):
        assert (past.tokens, past.text) == desk.cold(past)
