"""``POST /v1/chat/completions``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from mlx_receiver.http.errors import bad_request
from mlx_receiver.http.openai import logprobs, parameters
from mlx_receiver.http.openai.bodies import ChatBody, parse
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
from mlx_receiver.http.openai.tools import ToolStream


@dataclass(slots=True)
class _Choice:
    """What one choice has become."""

    tools: ToolStream | None
    content: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: dict[str, Any] = field(default_factory=dict)
    finish: str | None = None
    stop_reason: int | str | None = None


class _Request:
    """One request's samples and how they are written."""

    def __init__(
        self,
        service: Service,
        body: ChatBody,
        prompt: list[int],
        handoff: HandOff | None,
        http: Request,
    ) -> None:
        self.service = service
        self.body = body
        self.prompt = prompt
        self.id, self.created = identity(http, "chatcmpl")
        tools = body.tools if body.tools and body.tool_choice != "none" else None
        parses = tools is not None and service.tokenizer.wrapper.has_tool_calling
        self.role, self.echo = _voice(body)
        rules = parameters.text_rules(body)
        if parses:
            # Some models' markers of a call are special tokens.
            rules = dataclasses.replace(rules, skip_special=False)
        room = service.room(prompt)
        sampling = service.sampling(body)
        self.samples = [
            Sample(index, prompt, parameters.fitted(sampling, room, index), rules)
            for index in range(body.n or 1)
        ]
        # vLLM answers with the parameters of the last sample.
        self.samples[-1].handoff = handoff
        self.choices = [
            _Choice(ToolStream(service.tokenizer, tools) if parses and tools else None)
            for _ in self.samples
        ]

    def _take(self, delta: Delta) -> tuple[_Choice, str, list[dict[str, Any]]]:
        """Add a delta to its choice; the content and the calls that it adds."""
        choice = self.choices[delta.index]
        content = delta.text
        calls: list[dict[str, Any]] = []
        if choice.tools is not None:
            content, calls = choice.tools.push(delta.text, delta.finish is not None)
        choice.content += content
        choice.calls += calls
        choice.token_ids += delta.token_ids
        choice.finish, choice.stop_reason = delta.finish, delta.stop_reason
        if delta.finish == "stop" and choice.calls:
            choice.finish = "tool_calls"
        return choice, content, calls

    def _logprobs(self, choice: _Choice, rows: list[Any]) -> dict[str, Any] | None:
        """Of the choice's latest tokens. Called for each step's: all of a long answer's at once
        would hold up everybody else."""
        if not self.body.logprobs:
            return None
        before = choice.token_ids[: len(choice.token_ids) - len(rows)]
        as_ids = bool(self.body.return_tokens_as_token_ids)
        names = logprobs.Names(self.service.tokenizer, before, as_ids)
        return logprobs.for_chat(rows, self.body.top_logprobs or 0, names)

    def _usage(self, samples: list[Sample] | None = None) -> dict[str, Any]:
        counted = self.samples if samples is None else samples
        tokens = sum(len(self.choices[s.index].token_ids) for s in counted)
        return usage(len(self.prompt), tokens, self.samples[-1].cached_tokens)

    async def whole(self) -> dict[str, Any]:
        """The response of a request that does not stream."""
        deltas = merged(self.service, self.samples)
        async with contextlib.aclosing(deltas):
            async for delta in deltas:
                choice, _, _ = self._take(delta)
                if (rows := self._logprobs(choice, delta.logprobs)) is not None:
                    logprobs.extend(choice.logprobs, rows)
        choices = []
        for index, choice in enumerate(self.choices):
            content = self.echo + choice.content
            message: dict[str, Any] = {"role": self.role, "content": content}
            if choice.calls:
                message["content"] = content or None
                message["tool_calls"] = [
                    {key: call[key] for key in ("id", "type", "function")} for call in choice.calls
                ]
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": choice.logprobs if self.body.logprobs else None,
                    "finish_reason": choice.finish,
                    "stop_reason": choice.stop_reason,
                    "token_ids": choice.token_ids if self.body.return_token_ids else None,
                }
            )
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.service.model,
            "choices": choices,
            "usage": self._usage(),
            "prompt_logprobs": None,
            "prompt_token_ids": self.prompt if self.body.return_token_ids else None,
            "kv_transfer_params": None,
        }

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The response of a request that streams."""
        final, continuous = wants_usage(self.body)
        head: dict[str, Any] = {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.service.model,
        }
        begun = False
        deltas = merged(self.service, self.samples)
        async with contextlib.aclosing(deltas):
            async for delta in deltas:
                if not begun:
                    begun = True
                    for sample in self.samples:
                        yield event(self._opening(head, sample, continuous, ""))
                    for sample in self.samples if self.echo else ():
                        yield event(self._opening(head, sample, continuous, self.echo))
                choice, content, calls = self._take(delta)
                ids = delta.token_ids
                silent = not content and not calls and delta.finish is None
                if silent and not (self.body.return_token_ids or delta.logprobs):
                    continue
                message: dict[str, Any] = {"content": content} if content or not calls else {}
                if calls:
                    message["tool_calls"] = calls
                entry = {
                    "index": delta.index,
                    "delta": message,
                    "logprobs": self._logprobs(choice, delta.logprobs),
                    "finish_reason": choice.finish,
                }
                if delta.finish is not None:
                    entry["stop_reason"] = delta.stop_reason
                if self.body.return_token_ids:
                    entry["token_ids"] = ids
                chunk = {**head, "choices": [entry]}
                if continuous:
                    chunk["usage"] = self._usage([self.samples[delta.index]])
                yield event(chunk)
        if final:
            yield event({**head, "choices": [], "usage": self._usage()})

    def _opening(
        self, head: dict[str, Any], sample: Sample, continuous: bool, echo: str
    ) -> dict[str, Any]:
        """The chunk that names the role, or the one with what is echoed."""
        entry = {
            "index": sample.index,
            "delta": {"content": echo} if echo else {"role": self.role, "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        chunk = {**head, "choices": [entry]}
        if self.body.return_token_ids and not echo:
            chunk["prompt_token_ids"] = self.prompt
        if continuous:
            chunk["usage"] = usage(len(self.prompt), 0, sample.cached_tokens)
        return chunk


async def chat_completions(service: Service, request: Request) -> Response:
    """Answer a conversation. Raises ApiError."""
    raw = await request.body()
    work = await service.workers.run(len(raw), _prepare, service, raw, request)
    if work.body.stream:
        return await stream(request, work.events())
    return as_json(await unless_gone(request, work.whole()))


def _prepare(service: Service, raw: bytes, http: Request) -> _Request:
    """Everything that takes long, in a thread. Raises ApiError."""
    vocab = service.vocab_size
    body = parse(raw, ChatBody, vocab)
    handoff = hand_off(body.kv_transfer_params, vocab)
    service.check_model(None if handoff else body.model)
    if handoff is not None:
        return _Request(service, body, handoff.prompt_token_ids, handoff, http)
    prompt = forwarded_prompt(body.kv_transfer_params, vocab)
    if prompt is None or body.echo:
        prompt = _prompt(service, body)
    return _Request(service, body, prompt, None, http)


#: Parameters of the function that applies the template: not for clients, who could otherwise bring
#: a template of their own.
_NO_OPTIONS: Final = frozenset(
    ("chat_template", "conversation", "messages", "tools", "tokenize", "padding", "truncation",
     "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
     "tokenizer_kwargs")
)  # fmt: skip


def _prompt(service: Service, body: ChatBody) -> list[int]:
    """The conversation's token ids, by the model's chat template. Raises ApiError."""
    if not body.messages:
        raise bad_request("messages is empty", "messages")
    options: dict[str, Any] = dict(body.chat_template_kwargs or {})
    if refused := sorted(_NO_OPTIONS & options.keys()):
        raise bad_request(
            f"chat_template_kwargs cannot set {', '.join(refused)}", "chat_template_kwargs"
        )
    if body.continue_final_message:
        options["continue_final_message"] = True
    options["add_generation_prompt"] = (
        body.add_generation_prompt is not False and not body.continue_final_message
    )
    messages = [_message(message) for message in body.messages]
    text = service.tokenizer.chat(messages, body.tools or None, options)
    # Templates write their own BOS.
    return service.tokenizer.encode(text, body.add_special_tokens)


def _voice(body: ChatBody) -> tuple[str, str]:
    """Who answers, and what ``echo`` puts before the answer, as vLLM has it: without a generation
    prompt the author of the last message goes on, and what one has said oneself is repeated."""
    role = "assistant"
    if not body.messages or (body.add_generation_prompt is not False and not body.echo):
        return role, ""
    last = _message(body.messages[-1])
    if body.add_generation_prompt is False:
        role = last["role"]
    return role, last["content"] if body.echo and last["role"] == role else ""


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """A message as templates expect it: content as one text, arguments of calls as objects."""
    if not isinstance(message.get("role"), str):
        raise bad_request("a message has no role", "messages")
    found = dict(message)
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) != len(content):
            raise bad_request("only content parts of type text are supported", "messages")
        found["content"] = "\n".join(texts)
    elif content is None:
        found["content"] = ""
    elif not isinstance(content, str):
        raise bad_request("a message's content must be a text or a list of parts", "messages")
    if calls := message.get("tool_calls"):
        found["tool_calls"] = [_call(call) for call in calls]
    return found


def _call(call: Any) -> dict[str, Any]:
    try:
        function = dict(call["function"])
        if isinstance(function.get("arguments"), str):
            function["arguments"] = json.loads(function["arguments"] or "{}")
        return {**call, "function": function}
    except (TypeError, KeyError, ValueError):
        raise bad_request(
            "a tool call needs a function whose arguments are JSON", "messages"
        ) from None
