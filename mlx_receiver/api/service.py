"""What every endpoint needs: the model, its tokenizer and defaults, and a way to decode."""

from __future__ import annotations

import contextlib
import hmac
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from starlette.requests import Request

from mlx_receiver.api.decoding import decode_locally
from mlx_receiver.api.errors import ApiError, bad_request
from mlx_receiver.api.parameters import Defaults
from mlx_receiver.api.parked import decode_handed_off
from mlx_receiver.api.prefill import Prefill
from mlx_receiver.api.sample import Sample
from mlx_receiver.api.tokenizer import Tokenizer
from mlx_receiver.local import check_job
from mlx_receiver.wire.messages import Decoded, Sampling, WireError

if TYPE_CHECKING:
    from mlx_receiver.receiver import Receiver

#: Largest request body, in bytes: several prompts of a million token ids.
MAX_BODY_BYTES: Final = 64 << 20


class Service:
    """One receiver, as its HTTP API sees it."""

    def __init__(self, receiver: Receiver) -> None:
        settings = receiver.settings
        self.source = receiver.source
        self.engine = receiver.engine
        self.handover = receiver.handover
        self.tokenizer = Tokenizer(receiver.source)
        self.defaults = Defaults(receiver.source)
        self.created = int(time.time())
        self.model = settings.served_model_name or receiver.source.name
        self._names = {self.model, receiver.source.name, Path(receiver.source.name).name}
        self._api_key = settings.api_key
        self._metrics = receiver.metrics
        self._prefill: Prefill | None = None
        if settings.prefill:
            self._prefill = Prefill(
                settings.prefill,
                settings.prefill_api_key,
                settings.prefill_min_tokens,
                settings.prefill_timeout,
            )

    def authorise(self, request: Request) -> None:
        """Raise ApiError (401) unless the request carries the API key, if there is one."""
        if not self._api_key:
            return
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(
            key.strip().encode(), self._api_key.encode()
        ):
            raise ApiError(401, "wrong or missing API key: send Authorization: Bearer KEY")

    def check_model(self, name: str | None) -> None:
        """Raise ApiError (404) for a model that is not the one served, 503 before it is loaded."""
        if name and name not in self._names:
            raise ApiError(404, f"the model {name!r} is not served here ({self.model} is)", "model")
        if self.engine.loaded is None:
            raise ApiError(503, "the model is still being loaded")

    async def body(self, request: Request) -> bytes:
        """The whole request body. Raises ApiError (413) when it is too long."""
        parts, total = [], 0
        async for part in request.stream():
            total += len(part)
            if total > MAX_BODY_BYTES:
                raise ApiError(413, f"the request body is over {MAX_BODY_BYTES >> 20} MiB")
            parts.append(part)
        return b"".join(parts)

    def room(self, prompt: list[int]) -> int:
        """Tokens that fit behind the prompt. Raises ApiError when none does."""
        room = self.source.max_tokens - len(prompt)
        if room < 1:
            raise bad_request(
                f"the prompt has {len(prompt)} tokens, the model's context {self.source.max_tokens}"
            )
        return room

    def check(self, prompt: list[int], sampling: Sampling) -> None:
        """Raise ApiError (400) for what cannot be decoded."""
        try:
            check_job(self.source, prompt, sampling)
        except WireError as error:
            raise bad_request(error.reason) from None

    async def decode(self, sample: Sample) -> AsyncGenerator[Decoded, None]:
        """The sample's tokens. Closing the generator stops decoding. Raises WireError."""
        path = await self._front_door(sample)

        def lost() -> None:
            nonlocal path
            path = path and "fallback"

        handoff, sampling = sample.handoff, sample.sampling
        if handoff is None or (sampling.logprobs is not None and handoff.logprobs is None):
            # Without the first token's log-probabilities another first token must be drawn.
            path = path if handoff is None else path and "fallback"
            tokens = decode_locally(self.engine, sample.prompt, sampling)
        else:
            tokens = decode_handed_off(self.engine, self.handover, handoff, sampling, lost)
        try:
            async with contextlib.aclosing(tokens):
                async for decoded in tokens:
                    yield decoded
        finally:
            if path is not None:
                self._metrics.frontdoor_requests.labels(path).inc()

    async def _front_door(self, sample: Sample) -> str | None:
        """Have vLLM prefill the prompt if that pays; which way it goes, None without such a vLLM
        or when a router has done it."""
        if self._prefill is None or sample.handoff is not None:
            return None
        if not self._prefill.pays(sample.prompt, sample.sampling):
            return "local"
        sample.handoff = await self._prefill.ask(sample.prompt, sample.sampling)
        return "fallback" if sample.handoff is None else "remote"
