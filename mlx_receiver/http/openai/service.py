"""What every endpoint needs: the model, its tokenizer and defaults, and a way to decode."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Final

from starlette.applications import Starlette

from mlx_receiver.decode.local import check_prompt
from mlx_receiver.decode.sampling import check_sampling
from mlx_receiver.http.errors import ApiError, bad_request
from mlx_receiver.http.openai.bodies import SamplingBody
from mlx_receiver.http.openai.claims import decode_handed_off
from mlx_receiver.http.openai.decoding import decode_locally
from mlx_receiver.http.openai.parameters import Defaults, sampling
from mlx_receiver.http.openai.prefill import Prefill
from mlx_receiver.http.openai.sample import Sample
from mlx_receiver.http.openai.tokenizer import Tokenizer
from mlx_receiver.http.served import Served
from mlx_receiver.http.workers import Workers
from mlx_receiver.wire.messages import Decoded, WireError
from mlx_receiver.wire.sampling import Sampling

#: Samples of all requests together, those that decode and those that wait.
MAX_WAITING: Final = 1024


class Service:
    """One receiver, as its HTTP API sees it."""

    def __init__(self, receiver: Served) -> None:
        settings = receiver.settings
        self.source = receiver.source
        self.engine = receiver.engine
        self.sessions = receiver.sessions
        self.tokenizer = Tokenizer(receiver.source)
        self.defaults = Defaults(receiver.source)
        self.created = int(time.time())
        self.model = settings.served_model_name or receiver.source.name
        self.vocab_size = receiver.source.signature.vocab_size
        self.workers = Workers()
        self._samples = 0
        self._names = {self.model, receiver.source.name, Path(receiver.source.name).name}
        self._metrics = receiver.metrics
        self._prefill: Prefill | None = None
        if settings.prefill:
            self._prefill = Prefill(
                settings.prefill,
                settings.prefill_api_key,
                settings.prefill_min_tokens,
                settings.prefill_timeout,
                self.vocab_size,
            )

    @contextlib.asynccontextmanager
    async def running(self, _application: Starlette) -> AsyncGenerator[None, None]:
        """What lives as long as the server: the connections to vLLM, and the threads."""
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self.workers.close)
            if self._prefill is not None:
                await stack.enter_async_context(self._prefill)
            yield

    def check_model(self, name: str | None) -> None:
        """Raise ApiError (404) for a model that is not the one served, 503 before it is loaded."""
        if name and name not in self._names:
            raise ApiError(404, f"the model {name!r} is not served here ({self.model} is)", "model")
        if self.engine.loaded is None:
            raise ApiError(503, "the model is still being loaded")

    def room(self, prompt: list[int]) -> int:
        """Tokens that fit behind the prompt. Raises ApiError (400) when it cannot be decoded."""
        try:
            check_prompt(self.source, prompt)
        except WireError as error:
            raise bad_request(error.reason, "prompt") from None
        return self.source.max_tokens - len(prompt)

    def sampling(self, body: SamplingBody) -> Sampling:
        """How the request's samples are drawn. Raises ApiError (400) for what cannot be done."""
        found = sampling(body, self.defaults, self.tokenizer)
        try:
            check_sampling(found, self.vocab_size)
        except WireError as error:
            raise bad_request(error.reason) from None
        return found

    @contextlib.contextmanager
    def places(self, samples: int) -> Iterator[None]:
        """Room for a request's samples, for as long as they are under way. Raises ApiError (503)
        when there is none."""
        if self._samples and self._samples + samples > MAX_WAITING:
            raise ApiError(503, f"{self._samples} samples are under way: try again later")
        self._samples += samples
        try:
            yield
        finally:
            self._samples -= samples

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

            def held(tokens: int) -> None:
                sample.held = tokens

            tokens = decode_locally(
                self.engine, sample.prompt, sampling, salt=sample.salt, held=held
            )
        else:
            tokens = decode_handed_off(self.engine, self.sessions, handoff, sampling, lost)
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
        sample.handoff = await self._prefill.ask(sample.prompt, sample.sampling, sample.salt)
        return "fallback" if sample.handoff is None else "remote"
