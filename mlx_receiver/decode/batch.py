"""The batch: the rows that MLX decodes together, and the prompts that it prefills between steps.

Everything here runs on the decoding thread.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any, Final

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, generation_stream

from mlx_receiver.decode.jobs import Job
from mlx_receiver.decode.model import LoadedModel, ModelSource
from mlx_receiver.decode.sampling import RequestSampler, greedy

logger = logging.getLogger(__name__)

#: The batch stops a request by itself only here: stopping is decided by ``check_stop``.
_NEVER: Final = 1 << 40

#: Prompts that are prefilled at once.
_MAX_PREFILLS: Final = 8

#: Seconds that a chunk of the prefills may take: running responses get a token in between.
PREFILL_SECONDS: Final = 0.15

#: Tokens of a chunk of one prompt: at least, before the first one is timed, and at most.
_LEAST_CHUNK, _FIRST_CHUNK, _LONGEST_CHUNK = 16, 128, 2048


@dataclass(slots=True)
class Row:
    """A job that is about to join: its caches, the tokens that they hold, and those that follow."""

    job: Job
    caches: list[Any]
    held: list[int]
    new: list[int]


class Batch:
    """mlx-lm's ``BatchGenerator``, and which job each of its rows is."""

    def __init__(self, source: ModelSource, loaded: LoadedModel, rows: int) -> None:
        """Of at most that many ``rows``."""
        self._source = source
        self._loaded = loaded
        self._rows = rows
        self._model = Float32Logits(loaded.model)
        self._active: dict[int, Job] = {}
        #: Rows whose caches mlx-lm cannot batch: they are decoded one after the other.
        self._lone: list[Row] = []
        self._generator = self._make_generator()

    def _make_generator(self) -> BatchGenerator:
        return BatchGenerator(
            self._model,
            max_tokens=_NEVER,
            sampler=greedy,
            completion_batch_size=self._rows,
            # ``takes`` bounds the prefills: a prompt that came with its cache must not wait for
            # the prefill of others.
            prefill_batch_size=self._rows,
            prefill_step_size=_FIRST_CHUNK,
        )

    def __len__(self) -> int:
        return len(self._active) + len(self._lone)

    @property
    def jobs(self) -> list[Job]:
        """The jobs in it."""
        return [*self._active.values(), *(row.job for row in self._lone)]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V of one token, as the model computes them."""
        return self._loaded.cache.layout.bytes_per_token

    def takes(self, job: Job) -> bool:
        """Whether there is a row for the job, and not too much to prefill before it."""
        if len(self) >= self._rows:
            return False
        prefills = sum(other.prefills and not other.shown for other in self.jobs)
        return not job.prefills or prefills < _MAX_PREFILLS

    def fits(self, job: Job, nbytes: int | None) -> bool:
        """Whether with the job the batch, in which every row is as long as the longest, stays
        within ``nbytes``."""
        if not self._active or nbytes is None:
            return True  # rows that are decoded one after the other are as long as they are
        longest = max(len(other.prompt_token_ids) + other.outputs for other in [*self.jobs, job])
        return (len(self) + 1) * self._loaded.cache.layout.nbytes(longest) <= nbytes

    def prepare(self, job: Job) -> Row:
        """What the job brings along. Raises what building its cache raises."""
        vocabulary = self._source.signature.vocab_size
        job.outputs = 0 if job.first_token is None else 1
        job.sampler = RequestSampler(job.sampling, job.prompt_token_ids, job.outputs, vocabulary)
        sampled = [] if job.first_token is None else [job.first_token]
        if job.build_cache is None:
            caches = self._loaded.cache.empty()
            return Row(job, caches, [], [*job.prompt_token_ids, *sampled])
        assert sampled
        build, job.build_cache = job.build_cache, None
        return Row(job, build(), [*job.prompt_token_ids], sampled)

    def decode_alone(self, row: Row) -> int:
        """The row's next token, which becomes its new one, without the batch."""
        assert row.job.sampler is not None
        row.held += row.new
        with mx.stream(generation_stream):
            logits = self._model(mx.array([row.new]), cache=row.caches)[:, -1, :]
            token = int(row.job.sampler.draw(row.held, logits).item())
        row.new = [token]
        return token

    def add(self, row: Row) -> None:
        """Let the row join."""
        job = row.job
        assert job.sampler is not None
        if not self._loaded.cache.batched:
            self._lone.append(row)
            return
        (uid,) = self._generator.insert(
            [row.new],
            max_tokens=[_NEVER],
            caches=[row.caches],
            all_tokens=[row.held],
            samplers=[job.sampler.sampler],
            logits_processors=[job.sampler.processors],
        )
        self._active[uid] = job

    def step(self) -> list[tuple[Job, int]]:
        """Each running job's next token, and a chunk of the prefills. Raises what MLX raises."""
        if self._lone:
            # One prompt at a time, so that the others need not wait for several chunks.
            prefilled = next((row for row in self._lone if self._prefill(row)), None)
            ready = [row for row in self._lone if row is not prefilled and len(row.new) == 1]
            return [(row.job, self.decode_alone(row)) for row in ready]
        generator = self._generator
        counters = generator._counters
        tokens, seconds = counters.prompt_tokens, counters.prompt_time
        self._compute_tokens()
        _, responses = generator.next()
        self._choose_chunk(counters.prompt_tokens - tokens, counters.prompt_time - seconds)
        return [(self._active[response.uid], response.token) for response in responses]

    def _prefill(self, row: Row) -> bool:
        """A chunk of what comes before the row's last token, if there is anything left of that."""
        chunk = row.new[: min(self._generator.prefill_step_size, len(row.new) - 1)]
        if not chunk:
            return False
        began = time.perf_counter()
        with mx.stream(generation_stream):
            self._model(mx.array([chunk]), cache=row.caches)  # its logits are never computed
            mx.eval([cache.state for cache in row.caches])
        row.held += chunk
        row.new = row.new[len(chunk) :]
        self._choose_chunk(len(chunk), time.perf_counter() - began)
        return True

    def _compute_tokens(self) -> None:
        """Let the tokens of the step that is under way be ready when it ends.

        Joins and leavings concatenate and select them lazily. Evaluated with the step that comes
        next, they would make every running response wait for that step, too.
        """
        batch = self._generator._generation_batch
        if len(batch):
            mx.async_eval(batch._next_tokens)

    def _choose_chunk(self, tokens: int, seconds: float) -> None:
        """Make the next chunk as long as this one's speed allows, of all prompts together."""
        if not tokens or seconds <= 0:
            return
        generator = self._generator
        prompts = len(generator._currently_processing) + len(generator._unprocessed_sequences)
        chunk = int(tokens * PREFILL_SECONDS / seconds / max(1, prompts))
        # A short chunk says little about a long one.
        chunk = min(chunk, 2 * generator.prefill_step_size, _LONGEST_CHUNK)
        generator.prefill_step_size = max(chunk, _LEAST_CHUNK)

    def remove(self, jobs: list[Job]) -> list[Job]:
        """Take out the jobs; returns those that were in it."""
        lone = [row for row in self._lone if row.job in jobs]
        self._lone = [row for row in self._lone if row.job not in jobs]
        rows = {uid: job for uid, job in self._active.items() if job in jobs}
        if rows:
            with mx.stream(generation_stream):
                self._generator.remove(list(rows))
            for uid in rows:
                del self._active[uid]
        return [*rows.values(), *(row.job for row in lone)]

    def restart(self) -> list[Job]:
        """Begin anew, without rows, after a step that failed; returns the jobs that were in it."""
        jobs = self.jobs
        self._active.clear()
        self._lone.clear()
        # A generator raises MLX's wired limit and puts it back when it ends: before the next one.
        self.close()
        self._generator = self._make_generator()
        return jobs

    def close(self) -> None:
        """Nothing is decoded any more."""
        try:
            self._generator.close()
        except Exception:
            logger.exception("closing the batch failed")

    def check_logits(self) -> None:
        """Raise ValueError for a model from which nothing can be sampled."""
        caches = self._loaded.cache.empty()
        logits = self._model(mx.array([[0, 1]]), cache=caches)
        # Finite for logits that are, or that are minus infinity where a token cannot come.
        if not mx.isfinite(mx.logsumexp(logits, axis=-1)).all().item():
            raise ValueError(
                f"its logits are not finite numbers in {self._loaded.dtype}: its weights are "
                "damaged, or too large for that dtype"
            )


class Float32Logits:
    """The model with float32 logits, as vLLM samples from them.

    ``BatchGenerator`` normalises logits in their own dtype; in bfloat16 that rounds different
    logits to equal ones.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.layers = model.layers

    def __call__(self, inputs: Any, cache: Any = None) -> Any:
        return self._model(inputs, cache=cache).astype(mx.float32)
