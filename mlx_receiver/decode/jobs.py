"""What the engine is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from mlx_receiver.caches.memory import Reservation
from mlx_receiver.wire.messages import Code, FinishReason, Logprobs
from mlx_receiver.wire.sampling import Sampling

if TYPE_CHECKING:
    from concurrent.futures import Future

    from mlx_receiver.decode.grammar.compiling import Compiled
    from mlx_receiver.decode.sampling import RequestSampler

BuildCache = Callable[[], list[Any] | None]


#: Lets the first tokens of a text's prompt be copied, as many as the first argument says, out of
#: the batch between two steps. ``wanted`` says whether they still are; ``done``, on the decoding
#: thread, gets a cache for each layer, or None where the text is not decoded any more.
CopyPrompt = Callable[[int, Callable[[], bool], Callable[[list[Any] | None], None]], None]


class Keep(Protocol):
    """Where what a text leaves goes. Called on the decoding thread."""

    def decoding(self, prompt: list[int], copy: CopyPrompt) -> None:
        """The text is decoded until it is ``gone``, and the cache of its prompt is whole."""

    def leaving(self) -> None:
        """The text ends, as somebody is about to hear: what it leaves will be there soon. Called by
        any thread."""

    def __call__(self, tokens: list[int], caches: list[Any]) -> None:
        """Keep the tokens, and a cache for each layer that holds all of them."""

    def gone(self) -> None:
        """It was kept, or will not be."""


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
    was sampled elsewhere. If such a job names a ``partition``, MLX prefills only what no earlier
    text of it has left: then ``build_cache`` returns caches of the prompt's first ``held`` tokens,
    or None.

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
    #: Gets the tokens and the caches that the text has at its end, or where it was cancelled.
    keep: Keep | None = None
    partition: str | None = None
    held: int = 0
    #: Whether MLX has a prompt to prefill for it.
    prefills: bool = field(default=False, init=False)
    #: Tokens of that prompt that it has prefilled.
    computed: int = field(default=0, init=False)
    #: Whether it is in the batch, or was.
    joined: bool = field(default=False, init=False)
    #: Whether a token of it has been decoded.
    shown: bool = field(default=False, init=False)
    #: Output tokens that exist, vLLM's first one included.
    outputs: int = field(default=0, init=False)
    #: Its sampling's grammar; the engine has it compiled before the job joins.
    grammar: Compiled | None = field(default=None, init=False)
    #: The same while it is compiled, if somebody has asked for that already.
    compiling: Future[Compiled] | None = field(default=None, init=False)
    sampler: RequestSampler | None = field(default=None, init=False)
    _over: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.prefills = self.build_cache is None

    @property
    def fault(self) -> str:
        """Why its grammar does not take what was sampled last; "" while it does."""
        grammar = self.sampler.grammar if self.sampler is not None else None
        return grammar.fault if grammar is not None else ""


class Memory(Protocol):
    """Where jobs that MLX prefills get their memory."""

    def begin(self, job: Job) -> None:
        """Reserve it, and let what need not be prefilled be found. Raises WireError
        (``capacity``)."""

    @property
    def spare_bytes(self) -> int:
        """Bytes that nobody needs now."""


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
    build_cache: Callable[[], list[Any]]
    following: int
    weights: str
    kv_dtype: str
    reservation: Reservation
    wanted: Callable[[], bool]
    done: Callable[[Verdict | None], None]
