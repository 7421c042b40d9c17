"""Giving sessions their memory, and what earlier texts left of their caches."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from mlx_receiver.caches.model import ModelCache
from mlx_receiver.sessions.branches import Branch
from mlx_receiver.sessions.earlier import NEW, Beginning, EarlierTexts
from mlx_receiver.sessions.session import Session
from mlx_receiver.wire.messages import E_CAPACITY, Code

logger = logging.getLogger(__name__)

#: Nanoseconds after its Open in which a session's cache may be read from disk, or be copied from a
#: text that is decoded: vLLM waits, and what is not there by then is sent.
READ_NS: Final = 1_000_000_000


class Allocation:
    """The threads that do it."""

    def __init__(
        self,
        earlier: EarlierTexts,
        opened: Callable[[Session], None],
        complete: Callable[[Session], None],
        fail: Callable[[Session, Code, str], None],
    ) -> None:
        """``opened`` is called when the first layer's memory is there, ``complete`` where nothing
        has to come behind the last one's, and ``fail`` when there is none."""
        #: Of the model; known once that is loaded.
        self.cache: ModelCache | None = None
        self._earlier = earlier
        self._opened, self._complete, self._fail = opened, complete, fail
        # Zeroing gigabytes takes a while: neither the control nor the decoding thread may wait.
        self._allocator = ThreadPoolExecutor(1, thread_name_prefix="kv-allocate")
        # Nor may a session that waits for nothing.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="kv-read")

    def begin(self, session: Session, headroom: int) -> None:
        """Give it room for its prompt and ``headroom`` tokens; its reservation is held for that."""
        thread = self._reader if session.beginning.waits else self._allocator
        thread.submit(self._allocate, session, headroom, session.beginning)

    def close(self) -> None:
        """Nothing is allocated any more."""
        for thread in (self._allocator, self._reader):
            thread.shutdown(wait=False, cancel_futures=True)

    def _allocate(self, session: Session, headroom: int, beginning: Beginning) -> None:
        try:
            if beginning.branch is not None:
                beginning = self._copied(session, beginning.branch)
            self._give_memory(session, headroom, beginning)
        except Exception as error:
            self._failed(session, error)  # else nobody would hear of it
        finally:
            if not beginning.alone:
                beginning.release()  # what is shared has been copied
            session.reservation.release()

    def _failed(self, session: Session, error: Exception) -> None:
        logger.exception("allocating session %s failed", session.id)
        self._fail(session, E_CAPACITY, f"allocating its KV memory failed: {error}")

    def _copied(self, session: Session, branch: Branch) -> Beginning:
        """What the session begins with, once that is copied from a text that is decoded."""
        if not session.alive:
            return NEW
        left = session.timeline.opened_ns + READ_NS - time.monotonic_ns()
        beginning = self._earlier.copied(
            session.partition, session.prompt_token_ids, session.layout, branch, left / 1e9
        )
        session.begin_with(beginning.held)
        session.beginning = beginning
        return beginning

    def _give_memory(self, session: Session, headroom: int, beginning: Beginning) -> None:
        if not session.alive:
            return
        try:
            assert self.cache is not None  # or there would be no memory to reserve
            buffers = self.cache.allocate(
                session.layout, session.tokens, headroom, beginning.earlier
            )
            if beginning.on_disk:
                while buffers.grow():
                    pass
                until = session.timeline.opened_ns + READ_NS
                held = self._earlier.read(
                    session.partition,
                    session.prompt_token_ids[: beginning.on_disk],
                    buffers,
                    lambda: session.alive and time.monotonic_ns() < until,
                )
                session.begin_with(held)
        except Exception as error:
            self._failed(session, error)
            return
        if not session.give_memory(buffers):
            return
        self._opened(session)
        try:
            while session.memory_grew() and buffers.grow():
                pass
        except Exception as error:
            self._failed(session, error)
        if session.completed():
            self._complete(session)
