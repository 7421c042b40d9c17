"""Samples: from prompt tokens to text deltas, and several samples as one stream."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from mlx_receiver.http.errors import ApiError, from_wire
from mlx_receiver.http.openai.sample import Sample
from mlx_receiver.http.openai.service import Service
from mlx_receiver.http.openai.text import OutputText
from mlx_receiver.wire.messages import Decoded, Logprobs, WireError


@dataclass(slots=True)
class Delta:
    """What a sample has grown by. ``finish`` is None while it goes on."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[Logprobs] = field(default_factory=list)
    finish: str | None = None
    stop_reason: int | str | None = None


async def generate(service: Service, sample: Sample) -> AsyncGenerator[Delta, None]:
    """The sample's deltas, the last one with ``finish``. Closing the generator stops decoding.

    Raises ApiError.
    """
    text = OutputText(service.tokenizer, sample.prompt, sample.rules)
    tokens = service.decode(sample)
    try:
        async with contextlib.aclosing(tokens):
            async for decoded in tokens:
                delta = _delta(sample, text, decoded)
                yield delta
                if delta.finish is not None:
                    return
    except WireError as error:
        raise from_wire(error) from error


def _delta(sample: Sample, text: OutputText, decoded: Decoded) -> Delta:
    piece, stop = text.push(decoded.token_ids, decoded.finish == "stop", bool(decoded.finish))
    delta = Delta(sample.index, piece, decoded.token_ids, decoded.logprobs or [])
    if stop is not None:
        delta.finish, delta.stop_reason = "stop", stop
    elif decoded.finish:
        delta.finish, delta.stop_reason = decoded.finish, decoded.stop_reason
    return delta


async def merged(service: Service, samples: Sequence[Sample]) -> AsyncGenerator[Delta, None]:
    """The deltas of several samples as they come. Closing the generator stops all of them.

    Raises ApiError, 503 when too many samples are under way.
    """
    # Bounded: where a client reads slowly, the samples wait, and ``Events`` counts.
    queue: asyncio.Queue[Delta | ApiError | None] = asyncio.Queue(2 * len(samples))

    async def run(sample: Sample) -> None:
        try:
            deltas = generate(service, sample)
            async with contextlib.aclosing(deltas):
                async for delta in deltas:
                    await queue.put(delta)
            await queue.put(None)
        except ApiError as error:
            await queue.put(error)
        except Exception as error:
            await queue.put(ApiError(500, f"decoding failed: {error}"))
            raise

    with service.places(len(samples)):
        tasks = [asyncio.create_task(run(sample)) for sample in samples]
        try:
            running = len(tasks)
            while running:
                event = await queue.get()
                if isinstance(event, ApiError):
                    raise event
                if event is None:
                    running -= 1
                else:
                    yield event
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
