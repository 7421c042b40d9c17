"""``POST /v1/chat/completions``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from msgspec import UNSET
from msgspec.structs import replace
from starlette.requests import Request
from starlette.responses import Response

from mlx_receiver.http.errors import bad_request
from mlx_receiver.http.openai import logprobs, parameters
from mlx_receiver.http.openai.answer import Answer, respond
from mlx_receiver.http.openai.bodies import ChatBody, parse
from mlx_receiver.http.openai.claims import HandOff, forwarded_prompt, hand_off
from mlx_receiver.http.openai.generation import Delta
from mlx_receiver.http.openai.responses import (
    ChatChoice,
    ChatLogprobs,
    ChatMessage,
    Reply,
    ToolCall,
)
from mlx_receiver.http.openai.sample import Sample
from mlx_receiver.http.openai.service import Service
from mlx_receiver.http.openai.structured import forced
from mlx_receiver.http.openai.tools import ForcedCalls, ToolStream


@dataclass(slots=True)
class _Grown:
    """What one sample has become."""

    tools: ToolStream | ForcedCalls | None
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: ChatLogprobs = field(default_factory=ChatLogprobs)
    finish: str | None = None
    stop_reason: int | str | None = None


class Chat(Answer[ChatBody, ChatChoice]):
    """An answer to a conversation."""

    prefix = "chatcmpl"
    kind = "chat.completion.chunk"

    def __init__(
        self,
        service: Service,
        body: ChatBody,
        prompt: list[int],
        handoff: HandOff | None,
        http: Request,
    ) -> None:
        super().__init__(service, body, http)
        self.prompt = prompt
        tools = body.tools if body.tools and body.tool_choice != "none" else None
        self.forced = forced(body)
        calls = self.forced is None and tools is not None
        parses = calls and service.tokenizer.wrapper.has_tool_calling
        self.role, self.echo = _voice(body)
        rules = parameters.text_rules(body)
        if parses:
            # Some models' markers of a call are special tokens.
            rules = dataclasses.replace(rules, skip_special=False)
        room = service.room(prompt)
        sampling = service.sampling(body)
        self.samples = [
            Sample(
                index,
                prompt,
                parameters.fitted(sampling, room, index),
                rules,
                body.cache_salt or "",
            )
            for index in range(self.n)
        ]
        # vLLM answers with the parameters of the last sample.
        self.samples[-1].handoff = handoff
        self._grown = [
            _Grown(
                ForcedCalls(self.forced)
                if self.forced is not None
                else ToolStream(service.tokenizer, tools)
                if parses and tools
                else None
            )
            for _ in self.samples
        ]

    def token_ids(self, index: int) -> list[int]:
        return self._grown[index].token_ids

    def opening(self) -> Iterator[Reply[ChatChoice]]:
        """The role of each choice, then what is echoed."""
        for sample in self.samples:
            delta = ChatMessage(role=self.role, content="")
            reply = self.reply([ChatChoice(index=sample.index, delta=delta)])
            if self.body.return_token_ids:
                reply.prompt_token_ids = self.prompt
            yield reply
        for sample in self.samples if self.echo else ():
            delta = ChatMessage(content=self.echo)
            yield self.reply([ChatChoice(index=sample.index, delta=delta)])

    def push(self, delta: Delta) -> ChatChoice | None:
        grown, body = self._grown[delta.index], self.body
        content = delta.text
        calls: list[ToolCall] = []
        if grown.tools is not None:
            content, calls = grown.tools.push(delta.text, delta.finish is not None)
            if body.parallel_tool_calls is False:
                calls = [call for call in calls if call.index == 0]
        grown.content += content
        grown.calls += calls
        grown.token_ids += delta.token_ids
        grown.finish, grown.stop_reason = delta.finish, delta.stop_reason
        # A call that was named is no news.
        if delta.finish == "stop" and grown.calls and not self.forced:
            grown.finish = "tool_calls"
        silent = not content and not calls and delta.finish is None
        if silent and not (body.return_token_ids or delta.logprobs):
            return None
        message = ChatMessage()
        if content or not calls:
            message.content = content
        if calls:
            message.tool_calls = calls
        choice = ChatChoice(index=delta.index, delta=message, finish_reason=grown.finish)
        if body.logprobs:
            names = self.names(delta.index, len(delta.logprobs))
            named = len(body.logprob_token_ids or ())
            count = named or body.top_logprobs or 0
            choice.logprobs = logprobs.for_chat(delta.logprobs, count, names, bool(named))
        if delta.finish is not None:
            choice.stop_reason = delta.stop_reason
        if body.return_token_ids:
            choice.token_ids = delta.token_ids
        return choice

    def keep(self, choice: ChatChoice) -> None:
        if choice.logprobs is not None:
            logprobs.extend(self._grown[choice.index].logprobs, choice.logprobs)

    def whole(self) -> Reply[ChatChoice]:
        wanted = bool(self.body.return_token_ids)
        reply = self.reply([], "chat.completion")
        for index, grown in enumerate(self._grown):
            content = self.echo + grown.content
            message = ChatMessage(role=self.role, content=content)
            if grown.calls:
                message.content = content or None
                message.tool_calls = [replace(call, index=UNSET) for call in grown.calls]
            choice = ChatChoice(
                index=index,
                message=message,
                logprobs=grown.logprobs if self.body.logprobs else None,
                finish_reason=grown.finish,
                stop_reason=grown.stop_reason,
                token_ids=grown.token_ids if wanted else None,
            )
            reply.choices.append(choice)
        reply.prompt_logprobs = None
        reply.prompt_token_ids = self.prompt if wanted else None
        reply.kv_transfer_params = None
        return reply


async def chat_completions(service: Service, request: Request) -> Response:
    """Answer a conversation. Raises ApiError."""
    return await respond(service, request, _prepare)


def _prepare(service: Service, raw: bytes, http: Request) -> Chat:
    return converse(service, parse(raw, ChatBody, service.vocab_size), http)


def converse(service: Service, body: ChatBody, http: Request) -> Chat:
    """The answer to a body that has been checked. Raises ApiError."""
    vocab = service.vocab_size
    handoff = hand_off(body.kv_transfer_params, vocab)
    service.check_model(None if handoff else body.model)
    if handoff is not None:
        return Chat(service, body, handoff.prompt_token_ids, handoff, http)
    prompt = forwarded_prompt(body.kv_transfer_params, vocab)
    if prompt is None or body.echo:
        prompt = prompt_ids(service, body)
    return Chat(service, body, prompt, None, http)


#: Parameters of the function that applies the template: not for clients, who could otherwise bring
#: a template of their own.
_NO_OPTIONS: Final = frozenset(
    ("chat_template", "conversation", "messages", "tools", "tokenize", "padding", "truncation",
     "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
     "tokenizer_kwargs")
)  # fmt: skip


def prompt_ids(service: Service, body: ChatBody) -> list[int]:
    """The conversation's token ids, by the model's chat template. Raises ApiError."""
    if not body.messages:
        raise bad_request("messages is empty", "messages")
    options: dict[str, Any] = dict(body.chat_template_kwargs or {})
    if refused := sorted(_NO_OPTIONS & options.keys()):
        raise bad_request(
            f"chat_template_kwargs cannot set {', '.join(refused)}", "chat_template_kwargs"
        )
    if body.reasoning_effort is not None:
        options["reasoning_effort"] = body.reasoning_effort
        # For templates whose models think only when told to.
        options.setdefault("enable_thinking", body.reasoning_effort != "none")
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
    except (TypeError, KeyError, ValueError, RecursionError):
        raise bad_request(
            "a tool call needs a function whose arguments are JSON", "messages"
        ) from None
