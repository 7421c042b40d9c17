"""What the scheduler half needs of vLLM's engine, and what the engine tells it.

vLLM's classes appear here as types only: the scheduler half runs against anything that has these
methods, and its tests do without vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mlx_receiver.wire.messages import Decoded

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
    from vllm.v1.request import Request


@dataclass(frozen=True)
class EngineRules:
    """What the engine itself does to every request's tokens, beyond their own parameters.

    ``everything`` is the reason for which it can hand nothing off, if there is one.
    """

    everything: str | None = None
    raw_logprobs: bool = True


class EnginePort(Protocol):
    """One engine. Every method may be called from any thread."""

    max_model_len: int
    rules: EngineRules

    @property
    def draining(self) -> bool:
        """Whether it waits for its requests to end: it stops, or is paused."""

    @property
    def weights_changed(self) -> bool:
        """Whether the weights were replaced after the start."""

    @property
    def idle(self) -> bool:
        """Whether it has nothing to do, and waits for requests."""

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

    def prefill(self, as_id: str, tokens: list[int]) -> Request:
        """Queue a request of nobody's for one token behind these, which its output will bring."""

    def continue_output(self, output: EngineCoreOutput, request_id: str) -> None:
        """Turn a continuation's output into one of the first request's."""


class EngineListener(Protocol):
    """What the engine asks and tells, on its own thread."""

    def rewrite(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        """Adjust what one engine step is about to send to the clients, and to the metrics."""

    def abort(self, request_ids: list[str]) -> list[str]:
        """The clients gave these requests up; returns the ids that vLLM's scheduler knows."""

    def aborted(self, request_id: str) -> None:
        """vLLM ended the request, or never began it, without an output."""

    def abort_all(self) -> None:
        """vLLM gives every request up."""

    def freeze(self) -> None:
        """vLLM holds every response until it is resumed."""

    def rejects(self, request_id: str, draining: bool) -> bool | None:
        """Whether an engine that takes no new requests must reject this one; None if it is no
        continuation of a response."""
