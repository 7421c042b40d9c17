"""``POST /v1/completions``."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mlx_receiver.api import logprobs, parameters
from mlx_receiver.api.bodies import CompletionBody, parse
from mlx_receiver.api.errors import bad_request
from mlx_receiver.api.generation import Delta, merged
from mlx_receiver.api.parked import HandOff, hand_off
from mlx_receiver.api.replies import (
    as_json,
    event,
    identity,
    stream,
    unless_gone,
    usage,
    wants_usage,
)
from mlx_receiver.api.sample import Sample
from mlx_receiver.api.service import Service


@dataclass(slots=True)
class _Prompt:
    token_ids: list[int]
    text: str | None
    handoff: HandOff | None = None


@dataclass(slots=True)
class _Choice:
    """What one choice has become."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    rows: list[Any] = field(default_factory=list)
    offset: int = 0
    begun: bool = False
    last: Delta | None = None


class _Request:
    """One request's samples and how they are written."""

    def __init__(
        self, service: Service, body: CompletionBody, prompts: list[_Prompt], http: Request
    ) -> None:
        self.service = service
        self.body = body
        self.prompts = prompts
        self.id, self.created = identity(http, "cmpl")
        self.n = parameters.samples(body)
        rules = parameters.text_rules(body)
        self.samples = []
        for number, prompt in enumerate(prompts):
            room = service.room(prompt.token_ids)
            for i in range(self.n):
                sampling = parameters.sampling(body, service.defaults, service.tokenizer, room, i)
                service.check(prompt.token_ids, sampling)
                self.samples.append(Sample(number * self.n + i, prompt.token_ids, sampling, rules))
            # vLLM answers with the parameters of the last sample.
            self.samples[-1].handoff = prompt.handoff
        self.choices = [_Choice() for _ in self.samples]

    def _prompt(self, index: int) -> _Prompt:
        return self.prompts[index // self.n]

    def _take(self, delta: Delta) -> tuple[_Choice, str]:
        """Add a delta to its choice; the text it adds, an echoed prompt included."""
        choice = self.choices[delta.index]
        text = delta.text
        if self.body.echo and not choice.begun:
            prompt = self._prompt(delta.index)
            echoed = prompt.text
            text = (
                self.service.tokenizer.decode(prompt.token_ids) if echoed is None else echoed
            ) + text
        choice.text += text
        choice.token_ids += delta.token_ids
        choice.rows += delta.logprobs
        choice.last = delta
        return choice, text

    def _logprobs(self, choice: _Choice, rows: list[Any]) -> dict[str, Any] | None:
        """Of the choice's latest tokens."""
        if self.body.logprobs is None:
            return None
        before = choice.token_ids[: len(choice.token_ids) - len(rows)]
        as_ids = bool(self.body.return_tokens_as_token_ids)
        names = logprobs.Names(self.service.tokenizer, before, as_ids)
        found, choice.offset = logprobs.for_completion(
            rows, self.body.logprobs, names, choice.offset
        )
        return found

    def _usage(self, samples: list[Sample] | None = None) -> dict[str, Any]:
        counted = self.samples if samples is None else samples
        prompts = {s.index // self.n: s for s in counted}.values()
        return usage(
            sum(len(s.prompt) for s in prompts),
            sum(len(self.choices[s.index].token_ids) for s in counted),
            sum(s.cached_tokens for s in counted),
        )

    async def whole(self) -> dict[str, Any]:
        """The response of a request that does not stream."""
        deltas = merged(self.service, self.samples)
        async with contextlib.aclosing(deltas):
            async for delta in deltas:
                choice, _ = self._take(delta)
                choice.begun = True
        choices = []
        for index, choice in enumerate(self.choices):
            assert choice.last is not None
            wanted = bool(self.body.return_token_ids)
            choices.append(
                {
                    "index": index,
                    "text": choice.text,
                    "logprobs": self._logprobs(choice, choice.rows),
                    "finish_reason": choice.last.finish,
                    "stop_reason": choice.last.stop_reason,
                    "token_ids": choice.token_ids if wanted else None,
                    "prompt_logprobs": None,
                    "prompt_token_ids": self._prompt(index).token_ids if wanted else None,
                }
            )
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.service.model,
            "choices": choices,
            "usage": self._usage(),
            "kv_transfer_params": None,
        }

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The response of a request that streams."""
        final, continuous = wants_usage(self.body)
        head = {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.service.model,
        }
        deltas = merged(self.service, self.samples)
        async with contextlib.aclosing(deltas):
            async for delta in deltas:
                choice, text = self._take(delta)
                entry: dict[str, Any] = {
                    "index": delta.index,
                    "text": text,
                    "logprobs": self._logprobs(choice, delta.logprobs),
                    "finish_reason": delta.finish,
                    "stop_reason": delta.stop_reason,
                }
                if self.body.return_token_ids:
                    prompt = self._prompt(delta.index).token_ids
                    entry["prompt_token_ids"] = None if choice.begun else prompt
                    entry["token_ids"] = delta.token_ids
                choice.begun = True
                chunk = {**head, "choices": [entry]}
                if continuous:
                    chunk["usage"] = self._usage([self.samples[delta.index]])
                yield event(chunk)
        if final:
            yield event({**head, "choices": [], "usage": self._usage()})


async def completions(service: Service, request: Request) -> Response:
    """Continue prompts. Raises ApiError."""
    body = parse(await service.body(request), CompletionBody)
    handoff = hand_off(body.kv_transfer_params)
    service.check_model(None if handoff else body.model)
    prompts = await asyncio.to_thread(_prompts, service, body, handoff)
    work = await asyncio.to_thread(_Request, service, body, prompts, request)
    if body.stream:
        return await stream(request, work.events())
    return as_json(await unless_gone(request, work.whole()))


def _prompts(service: Service, body: CompletionBody, handoff: HandOff | None) -> list[_Prompt]:
    """Every prompt as token ids. Raises ApiError for anything but OpenAI's four forms."""
    given = body.prompt
    many: list[Any] = given if isinstance(given, list) and not _are_ids(given) else [given]
    if handoff is not None and len(many) == 1:
        text = many[0] if isinstance(many[0], str) else None
        return [_Prompt(handoff.prompt_token_ids, text, handoff)]
    found = []
    for prompt in many:
        if isinstance(prompt, str):
            special = body.add_special_tokens is not False
            found.append(_Prompt(service.tokenizer.encode(prompt, special), prompt))
        elif _are_ids(prompt):
            found.append(_Prompt(list(prompt), None))
        else:
            raise bad_request(
                "prompt must be a text, a list of texts, a list of token ids or a list of such "
                "lists",
                "prompt",
            )
    if not found or not all(prompt.token_ids for prompt in found):
        raise bad_request("the prompt is empty", "prompt")
    for prompt in found:
        if handoff is not None and prompt.token_ids == handoff.prompt_token_ids:
            # Of several prompts vLLM answers with the parameters of one.
            prompt.handoff = handoff
            break
    return found


def _are_ids(prompt: Any) -> bool:
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(isinstance(token, int) and not isinstance(token, bool) for token in prompt)
    )
