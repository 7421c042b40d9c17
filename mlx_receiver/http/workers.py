"""Threads for what takes long: parsing, templates, tokenising."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")

#: Bytes of a request from which on it has to wait for the other large ones.
_LARGE: Final = 64 << 10

#: How long to rest after a large one, as a multiple of what it took: most of it is single calls
#: that let no other thread run Python, and whoever answers a health check needs several turns.
_REST: Final = 2.0
_LONGEST_REST: Final = 0.1


class Workers:
    """Few threads, because each that runs Python delays the event loop and the decoding thread; and
    one of their own for large requests, which small ones never wait for."""

    def __init__(self) -> None:
        self._small = ThreadPoolExecutor(2, thread_name_prefix="http-small")
        self._large = ThreadPoolExecutor(1, thread_name_prefix="http-large")
        self._rested = 0.0

    def close(self) -> None:
        """Begin nothing more."""
        for pool in (self._small, self._large):
            pool.shutdown(wait=False, cancel_futures=True)

    async def run(
        self, size: int, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs
    ) -> _T:
        """The result of ``work`` for a request of ``size`` bytes."""
        if size < _LARGE:
            return await asyncio.wrap_future(self._small.submit(work, *args, **kwargs))
        task = functools.partial(work, *args, **kwargs)
        return await asyncio.wrap_future(self._large.submit(self._at_ease, task))

    def _at_ease(self, work: Callable[[], _T]) -> _T:
        """The result of ``work``, in the thread for large requests."""
        time.sleep(max(0.0, self._rested - time.monotonic()))
        began = time.monotonic()
        try:
            return work()
        finally:
            ended = time.monotonic()
            self._rested = ended + min(_REST * (ended - began), _LONGEST_REST)
