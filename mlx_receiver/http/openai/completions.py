"""``POST /v1/completions``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mlx_receiver.http.errors import bad_request
from mlx_receiver.http.openai import logprobs, parameters
from mlx_receiver.http.openai.answer import Answer, respond
from mlx_receiver.http.openai.bodies import MAX_SAMPLES, CompletionBody, parse
from mlx_receiver.http.openai.claims import HandOff, forwarded_prompt, hand_off
from mlx_receiver.http.openai.generation import Delta
from mlx_receiver.http.openai.responses import CompletionChoice, CompletionLogprobs, Reply
from mlx_receiver.http.openai.sample import Sample
from mlx_receiver.http.openai.service import Service


@dataclass(slots=True)
class _Prompt:
    token_ids: list[int]
    text: str | None
    handoff: HandOff | None = None


@dataclass(slots=True)
class _Grown:
    """What one sample has become."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: CompletionLogprobs = field(default_factory=CompletionLogprobs)
    offset: int = 0
    begun: bool = False
    last: Delta | None = None


class _Completion(Answer[CompletionBody, CompletionChoice]):
    prefix = "cmpl"
    kind = "text_completion"

    def __init__(
        self, service: Service, body: CompletionBody, prompts: list[_Prompt], http: Request
    ) -> None:
        super().__init__(service, body, http)
        self.prompts = prompts
        rules = parameters.text_rules(body)
        sampling = service.sampling(body)
        self.samples = []
        for prompt in prompts:
            room = service.room(prompt.token_ids)
            for i in range(self.n):
                fitted = parameters.fitted(sampling, room, i)
                self.samples.append(
                    Sample(
                        len(self.samples), prompt.token_ids, fitted, rules, body.cache_salt or ""
                    )
                )
            # vLLM answers with the parameters of the last sample.
            self.samples[-1].handoff = prompt.handoff
        self._grown = [_Grown() for _ in self.samples]

    def token_ids(self, index: int) -> list[int]:
        return self._grown[index].token_ids

    def push(self, delta: Delta) -> CompletionChoice:
        """An echoed prompt is part of its first text."""
        grown, body = self._grown[delta.index], self.body
        prompt = self.prompts[delta.index // self.n]
        first, grown.begun = not grown.begun, True
        text = (prompt.text or "") + delta.text if body.echo and first else delta.text
        grown.text += text
        grown.token_ids += delta.token_ids
        grown.last = delta
        choice = CompletionChoice(
            index=delta.index,
            text=text,
            logprobs=None,
            finish_reason=delta.finish,
            stop_reason=delta.stop_reason,
        )
        if body.logprobs is not None:
            names = self.names(delta.index, len(delta.logprobs))
            choice.logprobs, grown.offset = logprobs.for_completion(
                delta.logprobs,
                len(body.logprob_token_ids or ()) or body.logprobs,
                names,
                grown.offset,
            )
        if body.return_token_ids:
            choice.prompt_token_ids = prompt.token_ids if first else None
            choice.token_ids = delta.token_ids
        return choice

    def keep(self, choice: CompletionChoice) -> None:
        if choice.logprobs is not None:
            logprobs.extend(self._grown[choice.index].logprobs, choice.logprobs)

    def whole(self) -> Reply[CompletionChoice]:
        wanted = bool(self.body.return_token_ids)
        reply = self.reply([])
        for index, grown in enumerate(self._grown):
            assert grown.last is not None
            choice = CompletionChoice(
                index=index,
                text=grown.text,
                logprobs=grown.logprobs if self.body.logprobs is not None else None,
                finish_reason=grown.last.finish,
                stop_reason=grown.last.stop_reason,
                token_ids=grown.token_ids if wanted else None,
                prompt_logprobs=None,
                prompt_token_ids=self.prompts[index // self.n].token_ids if wanted else None,
            )
            reply.choices.append(choice)
        reply.kv_transfer_params = None
        return reply


async def completions(service: Service, request: Request) -> Response:
    """Continue prompts. Raises ApiError."""
    return await respond(service, request, _prepare)


def _prepare(service: Service, raw: bytes, http: Request) -> _Completion:
    vocab = service.vocab_size
    body = parse(raw, CompletionBody, vocab)
    handoff = hand_off(body.kv_transfer_params, vocab)
    service.check_model(None if handoff else body.model)
    return _Completion(service, body, _prompts(service, body, handoff), http)


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
