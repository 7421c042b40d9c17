"""``POST /v1/completions``."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mlx_receiver.http.errors import bad_request
from mlx_receiver.http.openai import logprobs, parameters
from mlx_receiver.http.openai.bodies import MAX_SAMPLES, CompletionBody, parse
from mlx_receiver.http.openai.generation import Delta, merged
from mlx_receiver.http.openai.parked import HandOff, forwarded_prompt, hand_off
from mlx_receiver.http.openai.replies import (
    as_json,
    event,
    identity,
    stream,
    unless_gone,
    usage,
    wants_usage,
)
from mlx_receiver.http.openai.sample import Sample
from mlx_receiver.http.openai.service import Service


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
    logprobs: dict[str, Any] = field(default_factory=dict)
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
        self.n = body.n
        rules = parameters.text_rules(body)
        sampling = service.sampling(body)
        self.samples: list[Sample] = []
        for prompt in prompts:
            room = service.room(prompt.token_ids)
            for i in range(self.n):
                fitted = parameters.fitted(sampling, room, i)
                self.samples.append(Sample(len(self.samples), prompt.token_ids, fitted, rules))
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
            text = (self._prompt(delta.index).text or "") + text
        choice.text += text
        choice.token_ids += delta.token_ids
        choice.last = delta
        return choice, text

    def _logprobs(self, choice: _Choice, rows: list[Any]) -> dict[str, Any] | None:
        """Of the choice's latest tokens. Called for each step's: all of a long answer's at once
        would hold up everybody else."""
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
                if (rows := self._logprobs(choice, delta.logprobs)) is not None:
                    logprobs.extend(choice.logprobs, rows)
        choices = []
        for index, choice in enumerate(self.choices):
            assert choice.last is not None
            wanted = bool(self.body.return_token_ids)
            choices.append(
                {
                    "index": index,
                    "text": choice.text,
                    "logprobs": choice.logprobs if self.body.logprobs is not None else None,
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
    raw = await request.body()
    work = await service.workers.run(len(raw), _prepare, service, raw, request)
    body = work.body
    if body.stream:
        return await stream(request, work.events())
    return as_json(await unless_gone(request, work.whole()))


def _prepare(service: Service, raw: bytes, http: Request) -> _Request:
    """Everything that takes long, in a thread. Raises ApiError."""
    vocab = service.vocab_size
    body = parse(raw, CompletionBody, vocab)
    handoff = hand_off(body.kv_transfer_params, vocab)
    service.check_model(None if handoff else body.model)
    return _Request(service, body, _prompts(service, body, handoff), http)


def _prompts(service: Service, body: CompletionBody, handoff: HandOff | None) -> list[_Prompt]:
    """Every prompt as token ids. Raises ApiError for anything but OpenAI's four forms."""
    given = body.prompt
    many: list[Any] = given if isinstance(given, list) and not _is_prompt(given) else [given]
    if len(many) * body.n > MAX_SAMPLES:
        raise bad_request(
            f"{len(many)} prompts times n = {body.n} are more than {MAX_SAMPLES} samples", "prompt"
        )
    forwarded = forwarded_prompt(body.kv_transfer_params, service.vocab_size)
    if len(many) == 1 and not many[0] and handoff is not None:
        return [_prompt(service, body, handoff.prompt_token_ids, handoff)]
    if len(many) == 1 and forwarded is not None and handoff is None and not body.echo:
        return [_prompt(service, body, forwarded)]
    found = [_prompt(service, body, prompt) for prompt in many]
    if not found or not all(prompt.token_ids for prompt in found):
        raise bad_request("the prompt is empty", "prompt")
    if handoff is not None:
        # Of several prompts vLLM answers with the parameters of one.
        mine = next((p for p in found if p.token_ids == handoff.prompt_token_ids), None)
        if mine is None:
            raise bad_request(
                "prompt is another one than kv_transfer_params.mac_decode.prompt_token_ids",
                "prompt",
            )
        mine.handoff = handoff
    return found


def _prompt(
    service: Service, body: CompletionBody, given: Any, handoff: HandOff | None = None
) -> _Prompt:
    if isinstance(given, str):
        return _Prompt(service.tokenizer.encode(given, body.add_special_tokens), given)
    if given is None:
        return _Prompt([], None)
    if not _are_ids(given):
        raise bad_request(
            "prompt must be a text, a list of texts, a list of token ids or a list of such lists",
            "prompt",
        )
    return _Prompt(given, service.tokenizer.decode(given) if body.echo else None, handoff)


def _is_prompt(given: list[Any]) -> bool:
    """Whether a list is one prompt's token ids, judged by its first entry."""
    return bool(given) and isinstance(given[0], int)


def _are_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and set(map(type, prompt)) == {int}
