"""Threads for what takes long: parsing, templates, tokenising."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")

#: Bytes of a request from which on it has to wait for the other large ones.
_LARGE: Final = 64 << 10


class Workers:
    """Few threads, because each that runs Python delays the event loop and the decoding thread; and
    one of their own for large requests, which small ones never wait for."""

    def __init__(self) -> None:
        self._small = ThreadPoolExecutor(2, thread_name_prefix="http-small")
        self._large = ThreadPoolExecutor(1, thread_name_prefix="http-large")

    async def run(
        self, size: int, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs
    ) -> _T:
        """The result of ``work`` for a request of ``size`` bytes."""
        pool = self._large if size >= _LARGE else self._small
        return await asyncio.wrap_future(pool.submit(work, *args, **kwargs))
