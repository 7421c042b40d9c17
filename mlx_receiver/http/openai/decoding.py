"""One sample's tokens as an async iterator over the engine's callbacks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import Final

from mlx_receiver.decode.engine import DecodeEngine
from mlx_receiver.decode.jobs import Job, Output
from mlx_receiver.wire.messages import E_CAPACITY, Code, Decoded, WireError
from mlx_receiver.wire.sampling import Sampling

#: Steps that a sample may be ahead of its client. A client that reads nothing at all is cut off
#: before (``connections``).
MAX_AHEAD: Final = 4096


class Events:
    """What the decoding thread says, for one coroutine."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Decoded | WireError] = asyncio.Queue()
        self._overrun = False

    def put(self, event: Decoded | WireError) -> None:
        """Called from any thread; a loop that has ended wants nothing any more."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._add, event)

    def _add(self, event: Decoded | WireError) -> None:
        if self._overrun:
            return
        if self._queue.qsize() >= MAX_AHEAD:
            self._overrun = True
            event = WireError(E_CAPACITY, f"the client is {MAX_AHEAD} tokens behind")
        self._queue.put_nowait(event)

    async def get(self, timeout: float | None = None) -> Decoded:
        """The next tokens. Raises WireError when the decoder gave up, TimeoutError."""
        # Not ``wait_for``: in Python 3.11 it swallows a cancellation that comes together with an
        # event, and what the client no longer wants would be decoded to its end.
        async with asyncio.timeout(timeout):
            event = await self._queue.get()
        if isinstance(event, WireError):
            raise event
        return event


class _Sink:
    """See ``jobs.Sink``."""

    def __init__(self, events: Events) -> None:
        self._events = events

    def decoded(self, outputs: list[Output]) -> None:
        for output in outputs:
            self._events.put(
                Decoded(
                    session=0,
                    position=output.position,
                    token_ids=output.token_ids,
                    finish=output.finish,
                    stop_reason=output.stop_reason,
                    logprobs=output.logprobs,
                )
            )

    def failed(self, _job: Job, code: Code, reason: str) -> None:
        self._events.put(WireError(code, reason))


async def decode_locally(
    engine: DecodeEngine,
    prompt: list[int],
    sampling: Sampling,
    first_token: int | None = None,
    salt: str | None = None,
    held: Callable[[int], None] = lambda _: None,
) -> AsyncGenerator[Decoded, None]:
    """MLX prefills the prompt, and ``first_token`` behind it if one was sampled already. Not what
    an earlier text of the same ``salt`` has left: ``held`` is told its tokens. None: nobody's.

    Closing the generator cancels the job. Raises WireError.
    """
    events = Events()
    # Whoever may use the API is one identity.
    partition = None if salt is None else f"http\n\n{salt}"
    job = Job(prompt, sampling, _Sink(events), first_token, partition=partition)
    engine.submit(job)
    over = False
    try:
        while not over:
            decoded = await events.get()
            held(job.held)
            over = bool(decoded.finish)
            yield decoded
    finally:
        if not over:
            engine.cancel(job)
