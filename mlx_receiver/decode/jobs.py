"""What the engine is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from mlx_receiver.caches.memory import Reservation
from mlx_receiver.wire.messages import Code, FinishReason, Logprobs, Sampling

if TYPE_CHECKING:
    from mlx_receiver.decode.sampling import RequestSampler

BuildCache = Callable[[], list[Any]]


@dataclass(slots=True, eq=False)
class Output:
    """What one decode step gave one job.

    ``position`` counts output tokens from 0; vLLM's own first token, where there is one, is 0.
    ``finish`` is "", "stop" or "length".
    """

    job: Job
    position: int
    token_ids: list[int]
    finish: FinishReason = ""
    stop_reason: int | None = None
    logprobs: list[Logprobs] | None = None


class Sink(Protocol):
    """Where a job's results go. Called on the decoding thread; must not block."""

    def decoded(self, outputs: list[Output]) -> None:
        """What one step gave this sink's jobs. A job whose output has a ``finish`` is over."""

    def failed(self, job: Job, code: Code, reason: str) -> None:
        """The job is over without a result."""


@dataclass(slots=True, eq=False)
class Job:
    """A request to decode.

    With ``first_token`` and ``build_cache`` it continues a prompt whose cache exists: that is
    called once, on the decoding thread, and returns one cache a layer.
    Without ``build_cache`` MLX prefills the prompt itself, and the first token behind it if that
    was sampled elsewhere.

    The engine lets go of ``reservation`` once it holds nothing of the job any more; for a job
    without one it reserves memory itself.
    """

    prompt_token_ids: list[int]
    sampling: Sampling
    sink: Sink
    first_token: int | None = None
    build_cache: BuildCache | None = None
    reservation: Reservation | None = None
    #: Tokens that its text may have; 0: the model's.
    context: int = 0
    #: Whether MLX has a prompt to prefill for it.
    prefills: bool = field(default=False, init=False)
    #: Whether it is in the batch, or was.
    joined: bool = field(default=False, init=False)
    #: Whether a token of it has been decoded.
    shown: bool = field(default=False, init=False)
    #: Output tokens that exist, vLLM's first one included.
    outputs: int = field(default=0, init=False)
    sampler: RequestSampler | None = field(default=None, init=False)
    _over: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.prefills = self.build_cache is None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What comparing two caches gave: whether they are the ``same``, and in words how far apart
    they are."""

    same: bool
    text: str


@dataclass(slots=True, eq=False)
class Proof:
    """A prompt's cache that is to be compared with the model's own.

    ``following`` is the token that comes after the prompt, ``weights`` what vLLM's are kept in,
    ``kv_dtype`` the numbers that came.
    Nothing is computed once it is not ``wanted`` any more. ``done`` gets the verdict on the
    decoding thread, None where comparing failed; ``reservation`` covers the model's own cache, and
    the engine lets go of it.
    """

    prompt_token_ids: list[int]
    build_cache: BuildCache
    following: int
    weights: str
    kv_dtype: str
    reservation: Reservation
    wanted: Callable[[], bool]
    done: Callable[[Verdict | None], None]
