"""What the scheduler half needs of vLLM's engine, and what the engine tells it.

vLLM's classes appear here as types only: the scheduler half runs against anything that has these
methods, and its tests do without vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from mlx_receiver.wire.messages import Decoded
from mlx_receiver.wire.sampling import Thinking

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.request import Request


@dataclass(frozen=True)
class EngineRules:
    """What the engine itself does to every request's tokens, beyond their own parameters.

    ``everything`` is the reason for which it can hand nothing off, if there is one. Of JSON that a
    schema constrains: ``compact_json`` has no white space, ``closed_json`` no properties that the
    schema does not name, whatever library applies it. ``reasons``: grammars may begin behind the
    model's reasoning. ``thinking``: how a budget of that is kept; None where the receiver cannot.
    """

    everything: str | None = None
    raw_logprobs: bool = True
    compact_json: bool = False
    closed_json: bool = False
    reasons: bool = False
    thinking: Thinking | None = None


@dataclass(frozen=True)
class EngineLoad:
    """What the engine has to do: requests that are to be prefilled, the first of them with the
    tokens that are not computed, and the texts that it decodes."""

    waiting: int = 0
    pending: tuple[tuple[str, int], ...] = ()
    rows: int = 0


@dataclass(frozen=True)
class Machine:
    """What an engine computes with, as far as its speed depends on it.

    ``key`` names everything that does. A step computes ``chunk`` tokens of one request at the most,
    and decodes ``rows`` texts; a text has ``max_tokens``. ``kv_bytes`` is the memory for caches.
    """

    device: str
    model: str
    key: dict[str, str]
    chunk: int
    rows: int
    max_tokens: int
    vocab_size: int
    kv_bytes: int = 0


class PrefixCache(Protocol):
    """vLLM's prefix cache; for the engine's thread, ``withdraw`` for any."""

    #: Tokens that the length of a cached prefix is a multiple of.
    block: int
    #: Tokens that one step computes of one request, at the most.
    most_tokens: int
    #: Tokens that a request of nobody's may have before its last one.
    longest: int
    #: Tokens by which what is cached may be counted too few.
    slack: int

    def draft(self, as_id: str, tokens: list[int], salt: str | None, hashes: list[Any]) -> Request:
        """A request of nobody's with this prompt, not queued yet; ``hashes``: those of the first
        blocks of a conversation that begins with the prompt, or is begun by it."""

    def find(self, request: Request) -> tuple[int, float]:
        """How many of its tokens are cached, and which share of the cache's blocks no request would
        hold while it runs."""

    def room(self, tokens: int, rows: int) -> float:
        """Which share of the cache's blocks no request would hold while so many texts of so many
        tokens run."""

    def queue(self, request: Request) -> None:
        """Queue it behind everything else."""

    def withdraw(self, request_id: str) -> None:
        """Give it up, wherever it is."""

    def discount(self, stats: SchedulerStats, requests: int, queries: int, hits: int) -> None:
        """Take lookups (``queries`` and ``hits`` in tokens) out of a step's statistics."""


class EnginePort(Protocol):
    """One engine. Every method may be called from any thread."""

    max_model_len: int
    rules: EngineRules
    #: None where nothing may be prefilled for nobody.
    prefixes: PrefixCache | None
    #: None where nobody can say.
    machine: Machine | None

    @property
    def draining(self) -> bool:
        """Whether it waits for its requests to end: it stops, or is paused."""

    @property
    def weights_changed(self) -> bool:
        """Whether the weights were replaced after the start."""

    @property
    def idle(self) -> bool:
        """Whether it has nothing to do, and waits for requests."""

    def load(self, besides: str) -> EngineLoad:
        """What it has to do, for the engine's thread; not counting the request of that id."""

    def wake(self) -> None:
        """Make an idle engine look whether there is something to do."""

    def is_length(self, output: EngineCoreOutput) -> bool:
        """Whether the output ends its request because of a length limit."""

    def emit(self, client: int, outputs: list[EngineCoreOutput]) -> None:
        """Send outputs to a client, in one message, behind everything that was sent before."""

    def emit_aborted(self, request: Request) -> None:
        """Tell the request's client that it was given up."""

    def emit_decoded(self, decoded: list[tuple[Request, Decoded]]) -> None:
        """Send tokens that the receiver produced in one step, as a step of the engine's."""

    def resume(self, request: Request, as_id: str, tokens: list[int], max_tokens: int) -> bool:
        """Queue a local continuation of a request that has produced ``tokens``.

        False when those have used up its limit or the context: its client is told that it has
        ended.
        """

    def requeue(self, request: Request) -> None:
        """Queue a request of which nothing was produced, as it came."""

    def prefilled_elsewhere(
        self, request: Request, cached: int, arrived: float, begun: float
    ) -> None:
        """The next tokens of a request that this engine never had are its first: count its prompt,
        of which so many tokens were ``cached`` where it was prefilled, and when it ``arrived`` and
        was ``begun``, on the monotonic clock."""

    def grammar_ready(self, request: Request) -> bool:
        """Whether the engine's own grammar of the request can be advanced."""

    def reasoning_end(self, request: Request) -> int | None:
        """The token behind which the request's grammar begins; None: it begins at once. Raises
        LookupError where no single token ends the reasoning."""

    def accept(self, request: Request, tokens: list[int], after: int | None) -> int:
        """Advance the engine's own grammar of the request over the tokens, as if it had sampled
        them; how many of them it takes. ``after`` is what ``reasoning_end`` said."""

    def prefill(self, as_id: str, tokens: list[int]) -> Request:
        """Queue a request of nobody's for one token behind these, which its output will bring."""

    def trial(self, as_id: str, tokens: list[int], output: int) -> None:
        """Queue a request of nobody's for so many tokens behind these, behind everything else."""

    def withdraw(self, request_id: str) -> None:
        """Give a request of nobody's up, wherever it is."""

    def continue_output(self, output: EngineCoreOutput, request_id: str) -> None:
        """Turn a continuation's output into one of the first request's."""


class EngineListener(Protocol):
    """What the engine asks and tells, on its own thread."""

    def on_new_request(self, request: Request) -> bool:
        """A request comes; whether it is a receiver's, and the engine's scheduler must not have
        it."""

    def given_away(self, request_id: str) -> bool:
        """Whether a receiver does all of the request."""

    def rewrite(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        """Adjust what one engine step is about to send to the clients, and to the metrics."""

    def abort(self, request_ids: list[str]) -> list[str]:
        """The clients gave these requests up; returns the ids that vLLM's scheduler knows."""

    def aborted(self, request_id: str) -> None:
        """vLLM ended the request, or never began it, without an output."""

    def abort_all(self) -> None:
        """vLLM gives every request up."""

    def cache_reset(self) -> list[str]:
        """vLLM's prefix cache is about to be emptied; requests of nobody's that must end first."""

    def freeze(self) -> None:
        """vLLM holds every response until it is resumed."""

    def rejects(self, request_id: str, draining: bool) -> bool | None:
        """Whether an engine that takes no new requests must reject this one; None if it is no
        continuation of a response."""
