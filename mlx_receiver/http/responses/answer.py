"""``POST /v1/responses``."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator

import msgspec
from msgspec.structs import replace
from starlette.requests import Request
from starlette.responses import Response

from mlx_receiver.http.errors import ApiError
from mlx_receiver.http.openai import logprobs
from mlx_receiver.http.openai.answer import respond
from mlx_receiver.http.openai.chat import Chat, converse
from mlx_receiver.http.openai.responses import ChatLogprobs, ToolCall
from mlx_receiver.http.openai.service import Service
from mlx_receiver.http.openai.streams import named_event
from mlx_receiver.http.openai.translation import Piece, Translation, called
from mlx_receiver.http.responses import chats
from mlx_receiver.http.responses import objects as o
from mlx_receiver.http.responses.bodies import FunctionTool, ResponsesBody, parse


class _Responses(Translation):
    """Items one after the other: what the model says between calls is a message."""

    def __init__(self, chat: Chat, body: ResponsesBody, tools: list[FunctionTool]) -> None:
        super().__init__(chat)
        self._sequence = 0
        self._items: list[o.OutputItem] = []
        #: The message that grows; its text is joined once.
        self._message: o.OutputMessage | None = None
        self._text: list[str] = []
        self._logprobs = ChatLogprobs()
        self._logs = bool(chat.body.logprobs)
        sampling = self.sample.sampling
        choice = body.tool_choice
        if not tools:
            choice = "none"
        elif isinstance(choice, dict):
            choice = {"type": "function", "name": choice["name"]}
        self._response = o.ResponseObject(
            id=f"resp_{uuid.uuid4().hex}",
            created_at=int(time.time()),
            instructions=body.instructions,
            metadata=body.metadata,
            model=chat.service.model,
            output=[],
            parallel_tool_calls=body.parallel_tool_calls is not False,
            temperature=sampling.temperature,
            tool_choice=choice,
            tools=tools,
            # Of no effect on the likeliest token; vLLM says so.
            top_p=sampling.top_p if sampling.temperature else 1.0,
            max_output_tokens=sampling.max_tokens,
            max_tool_calls=body.max_tool_calls,
            reasoning=body.reasoning,
            service_tier=body.service_tier,
            status="in_progress",
            text=body.text,
            top_logprobs=sampling.logprobs,
            user=body.user,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
        )

    def opening(self) -> Iterator[msgspec.Struct]:
        yield self._numbered(o.Created(response=self._response))
        yield self._numbered(o.InProgress(response=self._response))

    def push(self, piece: Piece) -> Iterator[msgspec.Struct]:
        logprobs.extend(self._logprobs, ChatLogprobs(piece.logprobs))
        if piece.text:
            if self._message is None:
                yield from self._begin()
            assert self._message is not None
            self._text.append(piece.text)
            delta = o.TextDelta(
                item_id=self._message.id,
                output_index=len(self._items),
                delta=piece.text,
                logprobs=piece.logprobs,
            )
            yield self._numbered(delta)
        for call in piece.calls:
            yield from self._end()
            yield from self._call(call)

    def closing(self, finish: str, stop: str | None) -> Iterator[msgspec.Struct]:
        yield from self._end()
        if not self._items and not self.streams:
            self._items.append(o.OutputMessage(id=_id("msg"), status="completed", content=[]))
        usage = self.chat.usage(self.chat.samples)
        status = "incomplete" if finish == "length" else "completed"
        self._response = replace(
            self._response,
            output=self._items,
            status=status,
            incomplete_details=(
                o.IncompleteDetails("max_output_tokens") if status == "incomplete" else None
            ),
            usage=o.ResponseUsage(
                usage.prompt_tokens,
                o.InputDetails(usage.prompt_tokens_details.cached_tokens),
                usage.completion_tokens,
                o.OutputDetails(),
                usage.total_tokens,
            ),
        )
        kind = o.Incomplete if status == "incomplete" else o.Completed
        yield self._numbered(kind(response=self._response))

    def whole(self) -> o.ResponseObject:
        return self._response

    def failed(self, error: ApiError) -> bytes:
        failed = o.ResponseError("server_error", error.message)
        response = replace(self._response, status="failed", error=failed, output=self._items)
        return named_event(self._numbered(o.Failed(response=response)))

    def _begin(self) -> Iterator[msgspec.Struct]:
        self._message = o.OutputMessage(id=_id("msg"), status="in_progress", content=[])
        index = len(self._items)
        yield self._numbered(o.ItemAdded(output_index=index, item=self._message))
        part = o.OutputText(text="", logprobs=[])
        yield self._numbered(o.PartAdded(item_id=self._message.id, output_index=index, part=part))

    def _end(self) -> Iterator[msgspec.Struct]:
        """Complete the message that grows, if there is one."""
        if self._message is None:
            return
        name, index, text = self._message.id, len(self._items), "".join(self._text)
        part = o.OutputText(text=text, logprobs=self._logprobs.content if self._logs else None)
        message = replace(self._message, status="completed", content=[part])
        self._items.append(message)
        self._message, self._text, self._logprobs = None, [], ChatLogprobs()
        yield self._numbered(o.TextDone(item_id=name, output_index=index, text=text))
        yield self._numbered(o.PartDone(item_id=name, output_index=index, part=part))
        yield self._numbered(o.ItemDone(output_index=index, item=message))

    def _call(self, call: ToolCall) -> Iterator[msgspec.Struct]:
        index, name, arguments = len(self._items), call.function.name, call.function.arguments
        done = o.FunctionCall(
            id=_id("fc"), call_id=call.id, name=name, arguments=arguments, status="completed"
        )
        self._items.append(done)
        begun = replace(done, arguments="", status="in_progress")
        yield self._numbered(o.ItemAdded(output_index=index, item=begun))
        delta = o.ArgumentsDelta(item_id=done.id, output_index=index, delta=arguments)
        yield self._numbered(delta)
        whole = o.ArgumentsDone(item_id=done.id, output_index=index, name=name, arguments=arguments)
        yield self._numbered(whole)
        yield self._numbered(o.ItemDone(output_index=index, item=done))

    def _numbered(self, event: o.Event) -> o.Event:
        event.sequence_number = self._sequence
        self._sequence += 1
        return event


async def responses(service: Service, request: Request) -> Response:
    """Answer a request. Raises ApiError."""
    return await respond(service, request, _prepare)


def _prepare(service: Service, raw: bytes, http: Request) -> _Responses:
    body = parse(raw, service.vocab_size)
    tools = chats.function_tools(body)
    chat = chats.chat(body, tools)
    with called(chats.NAMES):
        return _Responses(converse(service, chat, http), body, tools)


def _id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
