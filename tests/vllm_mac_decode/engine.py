"""An engine and a receiver for the relay's tests: they note what reaches them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from mlx_receiver.wire import messages as m
from mlx_receiver.wire.keys import new_ticket
from mlx_receiver.wire.layout import full_attention
from tests.vllm_mac_decode.plain import Output, Outputs, Params, Request, Stats
from vllm_mac_decode.scheduler.port import EngineLoad, EngineRules, Machine
from vllm_mac_decode.scheduler.relay import Relay
from vllm_mac_decode.scheduler.remote import Remote
from vllm_mac_decode.settings import Settings

VOCABULARY, CONTEXT, MODEL_LEN, BYTES = 100, 60, 80, 64
PROMPT = [1, 2, 3]


@dataclass
class Prefixes:
    """A prefix cache: ``held`` are the beginnings that are cached, a block's end each."""

    block: int = 4
    most_tokens: int = 64
    longest: int = 1000
    slack: int = 0
    free: float = 0.9
    broken: bool = False
    held: set[tuple[str | None, tuple[int, ...]]] = field(default_factory=set)
    queued: list[Request] = field(default_factory=list)
    withdrawn: list[str] = field(default_factory=list)
    discounted: list[tuple[int, int, int]] = field(default_factory=list)

    def draft(self, as_id: str, tokens: list[int], salt: str | None, hashes: list[Any]) -> Request:
        if self.broken:
            raise AttributeError("another vLLM")
        assert len(tokens) > self.block and len(tokens) % self.block == 1
        ends = range(self.block, len(tokens) + 1, self.block)
        made = [(salt, tuple(tokens[:end])) for end in ends]
        assert hashes == made[: len(hashes)] or made == hashes[: len(made)], "another conversation"
        return Request(as_id, tokens, Params(1), cache_salt=salt, block_hashes=made)

    def find(self, request: Request) -> tuple[int, float]:
        hits = 0
        while hits < len(request.block_hashes) and request.block_hashes[hits] in self.held:
            hits += 1
        return hits * self.block, self.free

    def room(self, tokens: int, rows: int) -> float:
        return self.free

    def queue(self, request: Request) -> None:
        self.queued.append(request)

    def withdraw(self, request_id: str) -> None:
        self.withdrawn.append(request_id)

    def discount(self, stats: Stats, requests: int, queries: int, hits: int) -> None:
        self.discounted.append((requests, queries, hits))

    def compute(self, tokens: list[int], salt: str | None = None) -> None:
        """vLLM has computed these tokens."""
        for end in range(self.block, len(tokens) + 1, self.block):
            self.held.add((salt, tuple(tokens[:end])))


@dataclass
class Port:
    """Notes what reaches vLLM's queues: ``out`` for clients, ``resumed`` for the engine."""

    max_model_len: int = MODEL_LEN
    rules: EngineRules = field(default_factory=EngineRules)
    draining: bool = False
    weights_changed: bool = False
    broken: bool = False
    idle: bool = False
    out: list[tuple[str, list[int], str]] = field(default_factory=list)
    resumed: list[tuple[str, str, list[int], int]] = field(default_factory=list)
    #: Requests that nothing came of, and what is told of prompts: cached tokens, times.
    requeued: list[Request] = field(default_factory=list)
    prompts: dict[str, tuple[int, float, float]] = field(default_factory=dict)
    prefilled: list[Request] = field(default_factory=list)
    prefixes: Prefixes | None = field(default_factory=Prefixes)
    machine: Machine | None = None
    #: Requests of nobody's by their ids, and those that were given up.
    trials: dict[str, tuple[list[int], int]] = field(default_factory=dict)
    withdrawn: list[str] = field(default_factory=list)
    woken: int = 0
    #: What vLLM's own grammars do not take, what they were advanced over, and the end of reasoning.
    refuses: tuple[int, ...] = ()
    advanced: list[int] = field(default_factory=list)
    reasoning: int | Exception | None = None
    compiled: bool = True
    queued: EngineLoad = field(default_factory=EngineLoad)

    def load(self, besides: str) -> EngineLoad:
        return self.queued

    def wake(self) -> None:
        self.woken += 1

    def is_length(self, output: Output) -> bool:
        return output.finish_reason == "length"

    def emit(self, client: int, outputs: list[Output]) -> None:
        for o in outputs:
            self.out.append((o.request_id, list(o.new_token_ids), o.finish_reason or ""))

    def emit_aborted(self, request: Request) -> None:
        self.out.append((request.request_id, [], "abort"))

    def emit_decoded(self, decoded: list[tuple[Request, m.Decoded]]) -> None:
        for request, tokens in decoded:
            self.out.append((request.request_id, list(tokens.token_ids), tokens.finish))

    def resume(self, request: Request, as_id: str, tokens: list[int], max_tokens: int) -> bool:
        if self.broken:
            raise RuntimeError("no")
        if len(tokens) >= max_tokens:
            self.out.append((request.request_id, [], "length"))
            return False
        self.resumed.append((request.request_id, as_id, list(tokens), max_tokens))
        return True

    def requeue(self, request: Request) -> None:
        if self.broken:
            raise RuntimeError("no")
        self.requeued.append(request)

    def prefilled_elsewhere(
        self, request: Request, cached: int, arrived: float, begun: float
    ) -> None:
        assert request.request_id not in self.prompts
        assert request.request_id not in {name for name, *_ in self.out}
        self.prompts[request.request_id] = cached, arrived, begun

    def grammar_ready(self, request: Request) -> bool:
        return self.compiled

    def reasoning_end(self, request: Request) -> int | None:
        if isinstance(self.reasoning, Exception):
            raise self.reasoning
        return self.reasoning

    def accept(self, request: Request, tokens: list[int], after: int | None) -> int:
        for count, token in enumerate(tokens):
            if token in self.refuses:
                return count
            self.advanced.append(token)
        return len(tokens)

    def prefill(self, as_id: str, tokens: list[int]) -> Request:
        self.prefilled.append(Request(as_id, tokens, Params(max_tokens=1)))
        return self.prefilled[-1]

    def trial(self, as_id: str, tokens: list[int], output: int) -> None:
        self.trials[as_id] = (tokens, output)

    def withdraw(self, request_id: str) -> None:
        self.withdrawn.append(request_id)

    def continue_output(self, output: Output, request_id: str) -> None:
        output.request_id = request_id


@dataclass
class Link:
    """What is said to the receiver; ``up``: whether it can be."""

    up: bool = True
    where: str = "the test's"
    target: None = None
    path: m.DataPath | None = None
    measured: int = 0
    measurable: bool = True
    said: list[m.ClientMessage] = field(default_factory=list)
    #: How often it was said that blocks do not get through.
    doubts: int = 0

    def doubt(self) -> None:
        self.doubts += 1

    def measure(self) -> bool:
        self.measured += self.measurable
        return self.measurable

    def send(self, message: m.ClientMessage) -> bool:
        if self.up:
            self.said.append(message)
        return self.up


class Engine:
    """A relay between a stand-in for vLLM's engine and one for the receiver."""

    def __init__(self, **settings: Any) -> None:
        self.relay = Relay(Settings(**{"offload": "always"} | settings))
        self.port, self.link = Port(), Link()
        self.relay.engine = self.port  # type: ignore[assignment]
        self.receiver = self.join(self.link)
        self.relay.vocab_size = VOCABULARY
        self.relay.layout = full_attention(1, 4, 2, "float32")
        assert self.relay.layout.bytes_per_token == BYTES
        #: What its receivers offer.
        self.codecs = ["raw"]
        self.requests: dict[str, Request] = {}
        #: Those that vLLM's scheduler was not given.
        self.taken: set[str] = set()
        self.connect()

    def join(self, link: Link) -> Remote:
        """A receiver that is not connected yet."""
        remote = self.relay.join()
        remote.link = link  # type: ignore[assignment]
        return remote

    def connect(
        self,
        max_tokens: int = CONTEXT,
        remote: Remote | None = None,
        name: str = "r",
        proof: list[int] | None = None,
    ) -> bool:
        remote = remote or self.receiver
        remote.link.up = True  # type: ignore[union-attr]
        welcome = m.Welcome(name, "m", "e", [], new_ticket(), max_tokens, self.codecs, proof or [])
        return remote.connected(welcome)

    def lose(self, remote: Remote | None = None) -> None:
        remote = remote or self.receiver
        remote.link.up = False  # type: ignore[union-attr]
        remote.disconnected("it is gone")

    def add(self, name: str = "a", max_tokens: int = 8, **params: Any) -> Request:
        prompt = params.pop("prompt", PROMPT)
        transfer = params.pop("kv_transfer_params", None)
        blocks = params.pop("block_hashes", [])
        request = Request(name, prompt, Params(max_tokens, **params), transfer)
        request.block_hashes = blocks
        self.requests[name] = request
        if self.relay.on_new_request(request):  # type: ignore[arg-type]
            self.taken.add(name)
        return request

    def schedule(self, name: str = "a") -> int:
        """Returns the session's number, 0 if the request decodes locally."""
        session = self.relay.scheduled(name)
        return session.session if session is not None else 0

    def step(self, name: str = "a", token: int = 7, finished: bool | None = None) -> Any:
        """vLLM's engine has sampled a token; returns what goes out with the step."""
        finished = self.requests[name].max_tokens == 1 if finished is None else finished
        return self.put_out(Output(name, [token], "length" if finished else None))

    def put_out(self, output: Output) -> Outputs:
        """A step of vLLM's engine has this output; returns what goes out with the step."""
        outputs = Outputs([output], Stats())
        self.relay.rewrite({0: outputs})  # type: ignore[dict-item]
        return outputs

    def say(self, *messages: m.ReceiverMessage, by: Remote | None = None) -> None:
        for message in messages:
            (by or self.receiver).message(message, time.perf_counter())

    def complete(self, number: int, prompt: int = len(PROMPT)) -> None:
        self.say(m.Opened(number), m.Complete(number, prompt * BYTES))

    def started(self, name: str = "a", **params: Any) -> int:
        """A hand-off up to the first token."""
        self.add(name, **params)
        number = self.schedule(name)
        self.complete(number)
        self.step(name)
        return number

    def decode(self, number: int, position: int, *tokens: int, **fields: Any) -> None:
        self.say(m.Step([m.Decoded(number, position, list(tokens), **fields)]))

    def counts(self) -> Any:
        return self.relay.take_counts()

    def tokens(self, name: str = "a") -> list[int]:
        return [token for request, tokens, _ in self.port.out if request == name
                for token in tokens]  # fmt: skip
