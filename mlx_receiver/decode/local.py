"""Requests that MLX prefills itself, without vLLM."""

from __future__ import annotations

import queue
from collections.abc import Sequence

from mlx_receiver.decode.engine import DecodeEngine
from mlx_receiver.decode.jobs import Job, Output
from mlx_receiver.decode.model import ModelSource
from mlx_receiver.decode.sampling import check_sampling
from mlx_receiver.wire.messages import E_UNSUPPORTED, Code, WireError
from mlx_receiver.wire.sampling import Sampling


def check_prompt(source: ModelSource, prompt: Sequence[int]) -> None:
    """Raise WireError (``unsupported``) for a prompt that cannot be decoded."""
    vocab = source.signature.vocab_size
    if not prompt or len(prompt) >= source.max_tokens:
        raise WireError(
            E_UNSUPPORTED, f"a prompt of {len(prompt)} tokens (1..{source.max_tokens - 1})"
        )
    if not 0 <= min(prompt) <= max(prompt) < vocab:
        raise WireError(E_UNSUPPORTED, f"a prompt token is outside the vocabulary of {vocab}")


class LocalJob:
    """One prompt, and as its ``Sink`` a queue of its outputs; safe to read from any one thread."""

    def __init__(
        self,
        engine: DecodeEngine,
        prompt_token_ids: Sequence[int],
        sampling: Sampling,
        partition: str | None = None,
    ) -> None:
        """Submit at once. ``partition``: whose earlier texts it may continue, None for nobody's.
        Raises WireError (``unsupported``) for what cannot be sampled."""
        prompt = list(prompt_token_ids)
        check_prompt(engine.source, prompt)
        check_sampling(sampling, engine.source.signature.vocab_size)
        self._engine = engine
        self._results: queue.SimpleQueue[Output | WireError] = queue.SimpleQueue()
        self._job = Job(prompt, sampling, self, partition=partition)
        engine.submit(self._job)

    @property
    def held(self) -> int:
        """Tokens of the prompt that an earlier text had left."""
        return self._job.held

    def tokens(self) -> list[int]:
        """All output tokens. Raises WireError if the job failed."""
        found: list[int] = []
        while True:
            output = self.next()
            found += output.token_ids
            if output.finish:
                return found

    def next(self, timeout: float | None = None) -> Output:
        """The next output. Raises WireError if the job failed, queue.Empty after ``timeout`` s."""
        result = self._results.get(timeout=timeout)
        if isinstance(result, WireError):
            raise result
        return result

    def cancel(self) -> None:
        """Stop decoding; nothing arrives any more."""
        self._engine.cancel(self._job)

    def decoded(self, outputs: list[Output]) -> None:
        for output in outputs:
            self._results.put(output)

    def failed(self, _job: Job, code: Code, reason: str) -> None:
        self._results.put(WireError(code, reason))


def generate_tokens(
    engine: DecodeEngine, prompt_token_ids: Sequence[int], sampling: Sampling
) -> list[int]:
    """All output tokens of one prompt. Raises WireError."""
    return LocalJob(engine, prompt_token_ids, sampling).tokens()
