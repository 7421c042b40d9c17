"""The batch: the rows that MLX decodes together, and the prompts that it prefills between steps.

Everything here runs on the decoding thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, generation_stream

from mlx_receiver.decode.jobs import Job
from mlx_receiver.decode.model import LoadedModel, ModelSource
from mlx_receiver.decode.sampling import RequestSampler, greedy
from mlx_receiver.decode.turns import GAP_SECONDS
from mlx_receiver.wire.messages import E_UNSUPPORTED, WireError

logger = logging.getLogger(__name__)

#: The batch stops a request by itself only here: stopping is decided by ``check_stop``.
_NEVER: Final = 1 << 40

#: Prompts that are prefilled at once.
_MAX_PREFILLS: Final = 8

#: Seconds that a chunk of the prefills may take where nothing else is done between two steps.
PREFILL_SECONDS: Final = GAP_SECONDS

#: Tokens of a chunk of one prompt: at least, before the first one is timed, and at most.
_LEAST_CHUNK, _FIRST_CHUNK, _LONGEST_CHUNK = 16, 128, 2048


@dataclass(slots=True)
class Row:
    """A job that is about to join: its caches, the tokens that they hold, and those that follow."""

    job: Job
    caches: list[Any]
    held: list[int]
    new: list[int]


@dataclass(frozen=True, slots=True)
class Ended:
    """A job that leaves: the tokens that its caches hold."""

    job: Job
    tokens: list[int]
    caches: list[Any]


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
        #: Tokens of prompts that the last step prefilled, and the seconds that it took for them.
        self.prefilled = 0, 0.0
        #: Tokens of a chunk that takes ``PREFILL_SECONDS``, of all prompts together.
        self._chunk = _FIRST_CHUNK
        #: Tokens of the chunk under way, if there are as many, and the seconds that it may take.
        self._asked = 0, 0.0
        #: Tokens that the step under way begins with, until their samplers know of them.
        self._coming: mx.array | None = None
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
            # Its prompts would be computed in pieces of that many tokens: a chunk is one forward.
            prefill_step_size=_LONGEST_CHUNK,
        )

    def __len__(self) -> int:
        return len(self._active) + len(self._lone)

    @property
    def jobs(self) -> list[Job]:
        """The jobs in it."""
        return [*self._active.values(), *(row.job for row in self._lone)]

    @property
    def decoding(self) -> bool:
        """Whether somebody waits for a next token."""
        return any(job.shown or not job.prefills for job in self.jobs)

    @property
    def prefills(self) -> int:
        """Prompts in it that MLX prefills."""
        return sum(job.prefills and not job.shown for job in self.jobs)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V of one token, as the model computes them."""
        return self._loaded.cache.layout.bytes_per_token

    def takes(self, job: Job) -> bool:
        """Whether there is a row for the job, and not too much to prefill before it."""
        if len(self) >= self._rows:
            return False
        return not job.prefills or self.prefills < _MAX_PREFILLS

    def fits(self, job: Job, nbytes: int | None) -> bool:
        """Whether with the job the batch, in which every row is as long as the longest, stays
        within ``nbytes``."""
        if not self._active or nbytes is None:
            return True  # rows that are decoded one after the other are as long as they are
        longest = max(len(other.prompt_token_ids) + other.outputs for other in [*self.jobs, job])
        return (len(self) + 1) * self._loaded.cache.layout.nbytes(longest) <= nbytes

    def prepare(self, job: Job) -> Row:
        """What the job brings along. Raises WireError where its grammar does not take its first
        token, and what building its cache raises."""
        vocabulary = self._source.signature.vocab_size
        job.outputs = 0 if job.first_token is None else 1
        matcher = None
        if job.grammar is not None:
            assert job.sampling.grammar is not None
            matcher = job.grammar.begin(job.sampling.ends, job.sampling.grammar.after)
        job.sampler = RequestSampler(
            job.sampling, job.prompt_token_ids, job.outputs, vocabulary, matcher
        )
        if job.first_token is not None:
            _tell(job, job.first_token)
            if job.fault:
                raise WireError(E_UNSUPPORTED, job.fault)
        sampled = [] if job.first_token is None else [job.first_token]
        build, job.build_cache = job.build_cache, None
        caches = build() if build is not None else None
        if not job.prefills:
            assert sampled and caches is not None
            return Row(job, caches, [*job.prompt_token_ids], sampled)
        held = job.held if caches is not None else 0
        prompt, rest = job.prompt_token_ids[:held], job.prompt_token_ids[held:]
        return Row(job, caches or self._loaded.cache.empty(), prompt, [*rest, *sampled])

    def decode_alone(self, row: Row) -> int:
        """The row's next token, which becomes its new one, without the batch."""
        assert row.job.sampler is not None
        row.held += row.new
        with mx.stream(generation_stream):
            logits = self._model(mx.array([row.new]), cache=row.caches)[:, -1, :]
            if row.job.grammar is not None:
                mx.async_eval(logits)  # what may come is found meanwhile
            token = int(row.job.sampler.draw(row.held, logits).item())
        row.new = [token]
        _tell(row.job, token)
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

    def step(self, share: float = 1.0) -> list[tuple[Job, int]]:
        """Each running job's next token, and a chunk of the prefills, which takes a ``share`` of
        ``PREFILL_SECONDS``. Raises what MLX raises."""
        self._size_chunk(share)
        if self._lone:
            self.prefilled = 0, 0.0
            # One prompt at a time, so that the others need not wait for several chunks.
            prefilled = next((row for row in self._lone if self._prefill(row)), None)
            ready = [row for row in self._lone if row is not prefilled and len(row.new) == 1]
            return [(row.job, self.decode_alone(row)) for row in ready]
        generator = self._generator
        counters = generator._counters
        tokens, seconds = counters.prompt_tokens, counters.prompt_time
        self._compute_tokens()
        samplers = [job.sampler for job in self._active.values()]
        follows = any(sampler is not None and sampler.follows for sampler in samplers)
        self._model.launched = self._tell_samplers if follows else None
        self._coming = generator._generation_batch._next_tokens
        prompts, responses = generator.next()
        for prompt in prompts:
            self._active[prompt.uid].computed = prompt.progress[0]
        self.prefilled = counters.prompt_tokens - tokens, counters.prompt_time - seconds
        self._choose_chunk(*self.prefilled)
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
        row.job.computed += len(chunk)
        self.prefilled = len(chunk), time.perf_counter() - began
        self._choose_chunk(*self.prefilled)
        return True

    def _compute_tokens(self) -> None:
        """Let the tokens of the step that is under way be ready when it ends.

        Joins and leavings concatenate and select them lazily. Evaluated with the step that comes
        next, they would make every running response wait for that step, too.
        """
        batch = self._generator._generation_batch
        if len(batch):
            mx.async_eval(batch._next_tokens)

    def _tell_samplers(self) -> None:
        """Let the samplers know the tokens that the step begins with, once it is launched.

        The generator reads them only when it has issued the step's sampling, too, which needs what
        may come behind them. They were computed in the step before, so waiting for them here costs
        nothing while the model is busy with the step that was launched.
        """
        batch = self._generator._generation_batch
        # Rows that have just been prefilled are stepped by themselves; their prompts are no output.
        if self._coming is None or batch._current_tokens is not self._coming:
            return
        self._coming = None
        for uid, token in zip(batch.uids, batch._current_tokens.tolist(), strict=True):
            _tell(self._active[uid], token)

    def _size_chunk(self, share: float) -> None:
        """Divide the next chunk among the prompts that there are by now."""
        prompts = 1 if self._lone else max(1, self.prefills)
        each = int(self._chunk * share) // prompts
        each = min(max(each, _LEAST_CHUNK), _LONGEST_CHUNK)
        self._generator.prefill_step_size = each
        self._asked = each * prompts, PREFILL_SECONDS * share

    def _choose_chunk(self, tokens: int, seconds: float) -> None:
        """Make the next chunk as long as this one's speed allows."""
        asked, expected = self._asked
        # The end of a prompt says little of how fast a whole chunk is.
        if seconds <= 0 or (tokens < asked and seconds <= expected):
            return
        most = max(2 * tokens, self._chunk)
        # The shortest chunk is computed in any case, and may take little less than a longer one.
        short = self._generator.prefill_step_size == _LEAST_CHUNK and seconds <= PREFILL_SECONDS
        least = self._chunk if short else _LEAST_CHUNK
        self._chunk = max(min(int(tokens * PREFILL_SECONDS / seconds), most), least)

    def ended(self, jobs: Sequence[Job], spare: int) -> list[Ended]:
        """What those of the jobs hold that decode and want it kept, as far as copies of it fit into
        ``spare`` bytes. They must leave the batch then."""
        found = [
            Ended(row.job, row.held, row.caches)
            for row in self._lone
            if row.job in jobs and row.job.keep and len(row.new) == 1
        ]
        decoding = set(self._generator._generation_batch.uids)
        rows = {
            uid: job
            for uid, job in self._active.items()
            if job in jobs and job.keep and uid in decoding
        }
        for uid, job in rows.items():
            if len(decoding) > 1 and job.reservation is not None:
                spare -= job.reservation.nbytes
                if spare < 0:
                    break
            with mx.stream(generation_stream):
                ((held, tokens),) = self._generator.extract_cache([uid]).values()
                mx.eval([cache.state for cache in held])
            found.append(Ended(job, tokens, held))
        return found

    @property
    def layers(self) -> int:
        """The model's, each of which has a cache."""
        return len(self._loaded.cache.layout.layers)

    def decodes(self, job: Job) -> bool:
        """Whether the job is in it and nothing is left to be prefilled for it."""
        return self._place(job) is not None

    def beginning(self, job: Job, layer: int, tokens: int) -> Any:
        """A copy of what one layer holds of the first tokens of a job that it decodes."""
        place = self._place(job)
        assert place is not None
        with mx.stream(generation_stream):
            if isinstance(place, Row):
                cache = place.caches[layer]
            else:
                cache = self._generator._generation_batch.prompt_cache[layer].extract(place)
            return self._loaded.cache.beginning(layer, cache, tokens)

    def _place(self, job: Job) -> Row | int | None:
        """Where the job is decoded: by itself, or in which row of the batch."""
        for row in self._lone:
            if row.job is job:
                return row if len(row.new) == 1 else None
        uids = self._generator._generation_batch.uids
        return next((i for i, uid in enumerate(uids) if self._active.get(uid) is job), None)

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


def _tell(job: Job, token: int) -> None:
    """Let the job's sampler know the token."""
    if job.sampler is not None:
        job.sampler.accept(token)


class Float32Logits:
    """The model with float32 logits, as vLLM samples from them.

    ``BatchGenerator`` normalises logits in their own dtype; in bfloat16 that rounds different
    logits to equal ones.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.layers = model.layers
        #: Called when a step's computation is under way and its tokens are not sampled yet; where
        #: it is None, the two are launched together.
        self.launched: Callable[[], None] | None = None

    def __call__(self, inputs: Any, cache: Any = None) -> Any:
        logits = self._model(inputs, cache=cache).astype(mx.float32)
        if self.launched is not None and inputs.shape[1] == 1:
            mx.async_eval(logits)
            self.launched()
        return logits
