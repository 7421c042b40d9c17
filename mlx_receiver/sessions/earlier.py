"""What sessions begin with, and what they leave: the two tiers of earlier texts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mlx_receiver.caches.adapter import CARRIERS
from mlx_receiver.caches.memory import HEADROOM, Budget, Reservation
from mlx_receiver.caches.model import CacheBuffers, Earlier, ModelCache
from mlx_receiver.caches.plain import STEP
from mlx_receiver.decode.jobs import CopyPrompt, Job, Keep
from mlx_receiver.metrics import Metrics
from mlx_receiver.sessions.branches import LEAST_MORE, Branch, Branches, Copying, Decoded
from mlx_receiver.sessions.disk import BLOCK, DiskTier, Rows
from mlx_receiver.sessions.residents import Found, Resident, Residents
from mlx_receiver.wire.layout import ITEMSIZE, NOTHING, CacheLayout, Held
from mlx_receiver.wire.messages import WireError


@dataclass(frozen=True, slots=True)
class Beginning:
    """What is there of a prompt's cache: what an earlier text in memory has, what one has that is
    being decoded, or so many tokens ``on_disk``. ``there``: bytes that are reserved already."""

    found: Found | None = None
    earlier: Earlier | None = None
    there: int = 0
    on_disk: int = 0
    branch: Branch | None = None

    @property
    def held(self) -> Held:
        """What need not come, as far as it is known before anything was read."""
        return self.earlier.held if self.earlier is not None else NOTHING

    @property
    def waits(self) -> bool:
        """Whether what is held is known only once something was read or copied."""
        return self.on_disk > 0 or self.branch is not None

    @property
    def alone(self) -> bool:
        """Whether it is continued in its own memory."""
        return self.found is not None and self.found.alone

    def release(self) -> None:
        """It is not needed any more."""
        if self.found is not None:
            self.found.release()


#: A prompt that begins like nothing.
NEW = Beginning()


class EarlierTexts:
    """Finds what a prompt shares with earlier texts, and keeps what texts leave: the engine's
    ``jobs.Memory``. Thread-safe."""

    def __init__(self, budget: Budget, metrics: Metrics, enabled: bool = True) -> None:
        self.residents = Residents(metrics, enabled)
        self.decoded = Branches()
        self._budget = budget
        self._metrics = metrics
        self._cache: ModelCache | None = None
        self._disk: DiskTier | None = None

    def configure(self, cache: ModelCache, disk: DiskTier | None) -> None:
        """What is known once the model is loaded."""
        self._cache, self._disk = cache, disk

    def begin(self, job: Job) -> None:
        outputs = job.sampling.max_tokens
        reservation = self._budget.reserve(len(job.prompt_token_ids), outputs)
        job.reservation = reservation
        if job.partition is not None and self._cache is not None:
            job.keep = self.keeper(job.partition, self._cache.layout, reservation)
            if job.keep is not None:
                job.build_cache = partial(self._continue, self._cache, job, reservation)

    def prepare(self, job: Job) -> None:
        """As ``begin``, for a prompt of vLLM's. What an earlier text left of it is found at once:
        memory that it is continued in is not reserved twice."""
        cache, partition = self._cache, job.partition
        tokens, outputs = len(job.prompt_token_ids), job.sampling.max_tokens
        beginning = NEW
        if cache is not None and partition is not None:
            beginning = self._find_local(cache, job, patient=True)
        try:
            reservation = self._budget.reserve(tokens, outputs, there=beginning.there)
        except WireError:
            if beginning.found is None:
                raise
            beginning.release()  # perhaps there is room in its place
            beginning = NEW
            reservation = self._budget.reserve(tokens, outputs)
        job.reservation = reservation
        reservation.finally_do(beginning.release)
        if cache is not None and partition is not None:
            job.keep = self.keeper(partition, cache.layout, reservation, tokens, beginning)
            if job.keep is not None:
                job.build_cache = partial(self._continue, cache, job, reservation, beginning)

    def _continue(
        self,
        cache: ModelCache,
        job: Job,
        reservation: Reservation,
        beginning: Beginning = NEW,
    ) -> list[Any] | None:
        """What earlier texts left of a prompt that MLX prefills. On the decoding thread, where all
        that has ended has been kept."""
        if not beginning.alone:  # there may be more by now
            beginning.release()
            beginning = self._find_local(cache, job)
        earlier = beginning.earlier
        if earlier is None:
            return None
        try:
            held = earlier.held.tokens
            room = len(job.prompt_token_ids) + job.sampling.max_tokens - held
            buffers = cache.allocate(cache.layout, held, min(room, HEADROOM), earlier)
            while buffers.grow():
                pass
            self.take(beginning, reservation)
            job.held = held
            self._metrics.held_tokens.inc(held)
            return buffers.build()
        finally:
            beginning.release()

    def _find_local(self, cache: ModelCache, job: Job, patient: bool = False) -> Beginning:
        """What MLX itself need not compute; the prompt's last token it must. ``patient``: wait for
        what has just ended."""
        assert job.partition is not None
        prompt, layout = job.prompt_token_ids[:-1], cache.layout
        beginning = self.find(
            job.partition, prompt, layout, job.sampling.max_tokens, local=True, patient=patient
        )
        if beginning.earlier is None:
            return NEW
        # Nobody sends what is not kept: it would have to be there of exactly these tokens.
        had, held = beginning.earlier.tokens, beginning.held.tokens
        if cache.lasts or (cache.whole and layout.kept_alike(had, held)):
            return beginning
        beginning.release()
        return NEW

    def find(
        self,
        partition: str,
        prompt: Sequence[int],
        layout: CacheLayout,
        headroom: int,
        local: bool = False,
        patient: bool = False,
    ) -> Beginning:
        """What is there of the prompt, which comes in a client's ``layout``; ``local``: nothing
        may be read or waited for. ``patient``: on another thread than the decoding one, where
        nothing can be copied and what has just ended is waited for."""
        cache = self._cache
        if cache is None or not self.residents.enabled or not cache.resumes(layout):
            return NEW
        room = len(prompt) + min(headroom, STEP)

        def fits(caches: Sequence[Any]) -> bool:
            return cache.room(caches) >= room

        found = self.residents.find(partition, prompt, fits, patient=patient or not local)
        there = found.tokens if found is not None else 0
        on_disk = self._disk.covers(partition, prompt) if self._disk and not local else 0
        branches = cache.branches and not patient
        branch = self.decoded.find(partition, prompt) if branches else None
        if branch is not None and branch.tokens >= LEAST_MORE + max(there, on_disk):
            if found is not None:
                found.release()
            if not local:
                return Beginning(branch=branch)
            self._copy(branch, 0.0)  # at once, since this is the decoding thread
            found = self.residents.find(partition, prompt, fits, patient=False)
        elif on_disk and on_disk >= BLOCK + there:
            if found is not None:
                found.release()
            return Beginning(on_disk=on_disk)
        return self._held(found, prompt, layout)

    def _held(self, found: Found | None, prompt: Sequence[int], layout: CacheLayout) -> Beginning:
        cache = self._cache
        if found is None or cache is None:
            return NEW
        had = len(found.resident.tokens)
        held = Held(found.tokens, layout.kept_alike(had, len(prompt)))
        earlier = Earlier(found.caches, had, held, found.alone)
        return Beginning(found, earlier, cache.lasting_bytes(had) if found.alone else 0)

    def copied(
        self,
        partition: str,
        prompt: Sequence[int],
        layout: CacheLayout,
        branch: Branch,
        seconds: float,
    ) -> Beginning:
        """What is there of a prompt that begins like a text that is decoded, once that is copied;
        it is not waited for longer than so many ``seconds``."""
        # Another branch may have had it copied, and the text may have ended.
        found = self.residents.find(partition, prompt, lambda _: False, patient=False)
        if found is None or found.tokens < branch.tokens:
            if found is not None:
                found.release()
            self._copy(branch, seconds)
            found = self.residents.find(partition, prompt, lambda _: False, patient=False)
        return self._held(found, prompt, layout)

    def _copy(self, branch: Branch, seconds: float) -> None:
        """Let the branch be copied, and kept, unless there is no room."""
        text, tokens = branch.text, branch.text.prompt[: branch.tokens].tolist()
        try:
            reservation = self._budget.reserve(len(tokens), 1)
        except WireError:
            return
        copying = Copying()

        def done(caches: list[Any] | None) -> None:
            try:
                if caches is not None:
                    nbytes = sum(int(cache.nbytes) for cache in caches if cache is not None)
                    self.residents.add(
                        text.partition, tokens, caches, nbytes, reservation, len(tokens)
                    )
            finally:
                reservation.release()
                copying.finish()

        text.copy(len(tokens), copying.wanted, done)
        copying.wait(seconds)

    def read(
        self,
        partition: str,
        prompt: Sequence[int],
        buffers: CacheBuffers,
        wanted: Callable[[], bool],
    ) -> Held:
        """Put the prompt's tokens from the disk into memory that is all there, as long as that is
        ``wanted``; returns what is held then."""
        assert self._disk is not None

        def into(start: int, rows: Rows) -> bool:
            places = {place: buffers.part(*place) for place in self._places()}
            if rows.keys() != places.keys():
                return False
            for place, array in rows.items():
                end = start + array.shape[1]
                target = places[place][:, start:end]
                if (target.shape, target.dtype) != (array.shape, array.dtype):
                    return False
                target[...] = array
            return True

        return Held(self._disk.load(partition, prompt, into, wanted))

    def take(self, beginning: Beginning, reservation: Reservation) -> None:
        """A session that continues a text in its own memory is about to decode."""
        if beginning.found is not None and beginning.found.alone:
            self.residents.take(beginning.found, reservation)
            reservation.finally_do(None)

    @property
    def spare_bytes(self) -> int:
        return self._budget.free + self.residents.nbytes

    def keeper(
        self,
        partition: str,
        layout: CacheLayout,
        reservation: Reservation,
        prompt_tokens: int = 0,
        beginning: Beginning = NEW,
    ) -> Keep | None:
        """What keeps a text that came in a client's ``layout``, or None where none is kept.
        ``prompt_tokens`` of it were asked, and it began like this."""
        cache = self._cache
        if cache is None or not self.residents.enabled or not cache.resumes(layout):
            return None
        continued = beginning.found.resident.number if beginning.found is not None else 0
        return _Keeper(self, partition, reservation, prompt_tokens, continued)

    def keep(
        self,
        partition: str,
        reservation: Reservation,
        prompt_tokens: int,
        continued: int,
        tokens: list[int],
        caches: list[Any],
    ) -> None:
        """Called on the decoding thread, while the reservation of the caches' memory is held. See
        ``Residents.add``."""
        cache = self._cache
        assert cache is not None  # see ``keeper``
        kept, nbytes = cache.kept(caches)
        resident = self.residents.add(
            partition, tokens, kept, nbytes, reservation, prompt_tokens, continued
        )
        if resident is not None and self._disk is not None:
            self._disk.save(partition, resident.tokens, partial(self._rows, resident))

    def close(self) -> None:
        """Keep nothing any more."""
        self.residents.close()
        if self._disk is not None:
            self._disk.close()

    def _places(self) -> list[tuple[int, int]]:
        """Layer and part of all that goes to disk."""
        assert self._cache is not None
        return self._cache.lasting_places

    def _rows(self, resident: Resident, start: int, end: int) -> Rows | None:
        """See ``disk.ReadRows``."""
        caches, cache = resident.caches, self._cache
        if not caches or cache is None:
            return None  # it has made room, or goes on
        layers = cache.layout.layers
        return {
            (layer, part): np.array(
                array[:, start:end].view(CARRIERS[ITEMSIZE[layers[layer].parts[part].dtype]])
            )
            for (layer, part), array in cache.lasting(caches, len(resident.tokens)).items()
        }


class _Keeper:
    """See ``decode.jobs.Keep``."""

    def __init__(
        self,
        texts: EarlierTexts,
        partition: str,
        reservation: Reservation,
        prompt_tokens: int,
        continued: int,
    ) -> None:
        self._texts = texts
        self._prompt_tokens, self._continued = prompt_tokens, continued
        self._partition = partition
        self._reservation = reservation
        self._lock = threading.Lock()
        self._expected = self._gone = False
        self._decoded: Decoded | None = None

    def decoding(self, prompt: list[int], copy: CopyPrompt) -> None:
        self._decoded = self._texts.decoded.add(self._partition, prompt, copy)

    def leaving(self) -> None:
        with self._lock:
            if self._expected or self._gone:
                return
            self._expected = True
        self._texts.residents.expect(self._partition, 1)

    def __call__(self, tokens: list[int], caches: list[Any]) -> None:
        self._texts.keep(
            self._partition, self._reservation, self._prompt_tokens, self._continued, tokens, caches
        )

    def gone(self) -> None:
        if self._decoded is not None:
            self._texts.decoded.remove(self._decoded)
        with self._lock:
            expected, self._gone = self._expected and not self._gone, True
        if expected:
            self._texts.residents.expect(self._partition, -1)
