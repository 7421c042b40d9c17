"""What both endpoints share: a request's samples, and how its answer is written."""

from __future__ import annotations

import contextlib
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from typing import ClassVar, Generic, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from mlx_receiver.http.errors import ApiError
from mlx_receiver.http.openai.bodies import SamplingBody
from mlx_receiver.http.openai.generation import Delta, merged
from mlx_receiver.http.openai.logprobs import Names
from mlx_receiver.http.openai.responses import CachedTokens, ChoiceT, Reply, Usage
from mlx_receiver.http.openai.sample import Sample
from mlx_receiver.http.openai.service import Service
from mlx_receiver.http.openai.streams import DONE, Events, event, stream, unless_gone
from mlx_receiver.http.replies import as_json

_Body = TypeVar("_Body", bound=SamplingBody)


class Answer(ABC, Generic[_Body, ChoiceT]):
    """One request. ``prefix`` begins its id, and ``kind`` is what its chunks are called."""

    prefix: ClassVar[str]
    kind: ClassVar[str]
    end = DONE
    #: As many for each prompt, in the prompts' order.
    samples: list[Sample]

    def __init__(self, service: Service, body: _Body, http: Request) -> None:
        self.service = service
        self.body = body
        self.n = body.n or 1
        # After the client's id if there is one.
        name = http.headers.get("x-request-id", "")[:256] or uuid.uuid4().hex
        self._id = f"{self.prefix}-{name}"
        self._created = int(time.time())

    @property
    def streams(self) -> bool:
        """Whether the client wants a stream."""
        return bool(self.body.stream)

    def failed(self, error: ApiError) -> bytes:
        """An error in a stream."""
        return event(error.body())

    @abstractmethod
    def token_ids(self, index: int) -> list[int]:
        """What a sample has become."""

    @abstractmethod
    def push(self, delta: Delta) -> ChoiceT | None:
        """Add to a sample; what a stream tells of it, None for nothing."""

    @abstractmethod
    def keep(self, choice: ChoiceT) -> None:
        """Add what ``whole`` needs of what ``push`` returned."""

    @abstractmethod
    def whole(self) -> Reply[ChoiceT]:
        """The answer in one, after everything has been pushed."""

    def opening(self) -> Iterator[Reply[ChoiceT]]:
        """What a stream begins with."""
        yield from ()

    def reply(self, choices: list[ChoiceT], kind: str = "") -> Reply[ChoiceT]:
        """A body with these choices."""
        return Reply(
            id=self._id,
            object=kind or self.kind,
            created=self._created,
            model=self.service.model,
            choices=choices,
        )

    def usage(self, samples: Sequence[Sample]) -> Usage:
        """Tokens of these; a prompt that several share counts once."""
        prompts = {s.index // self.n: len(s.prompt) for s in samples}
        into = sum(prompts.values())
        out = sum(len(self.token_ids(s.index)) for s in samples)
        cached = CachedTokens(sum(s.cached_tokens for s in samples))
        return Usage(into, into + out, out, cached)

    def names(self, index: int, latest: int) -> Names:
        """What a sample's latest tokens are called. Asked for at each step: all of a long answer's
        at once would hold up everybody else."""
        tokens = self.token_ids(index)
        as_ids = bool(self.body.return_tokens_as_token_ids)
        return Names(self.service.tokenizer, tokens[: len(tokens) - latest], as_ids)

    async def in_one(self) -> Response:
        """The answer to a request that does not stream."""
        deltas = merged(self.service, self.samples)
        async with contextlib.aclosing(deltas):
            async for delta in deltas:
                if (choice := self.push(delta)) is not None:
                    self.keep(choice)
        whole = self.whole()
        whole.usage = self.usage(self.samples)
        return as_json(whole)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer to a request that streams."""
        options = self.body.stream_options
        final = options is not None and bool(options.include_usage)
        continuous = final and options is not None and bool(options.continuous_usage_stats)
        begun = False
        deltas = merged(self.service, self.samples)
        async with contextlib.aclosing(deltas):
            async for delta in deltas:
                for reply in self._chunks(delta, begun):
                    if continuous:
                        reply.usage = self.usage([self.samples[reply.choices[0].index]])
                    yield event(reply)
                begun = True
        if final:
            reply = self.reply([])
            reply.usage = self.usage(self.samples)
            yield event(reply)

    def _chunks(self, delta: Delta, begun: bool) -> Iterator[Reply[ChoiceT]]:
        if not begun:
            yield from self.opening()
        if (choice := self.push(delta)) is not None:
            yield self.reply([choice])


class Told(Events, Protocol):
    """An answer, in one or as a stream."""

    @property
    def streams(self) -> bool:
        """Which of them the client wants."""

    async def in_one(self) -> Response:
        """The answer to a request that does not stream. Raises ApiError."""


#: Makes an answer of a request's body: everything that takes long, in a thread.
Prepare = Callable[[Service, bytes, Request], Told]


async def respond(service: Service, request: Request, prepare: Prepare) -> Response:
    """Answer a request. Raises ApiError."""
    raw = await request.body()
    answer = await service.workers.run(len(raw), prepare, service, raw, request)
    if answer.streams:
        return await stream(request, answer)
    return await unless_gone(request, answer.in_one())
