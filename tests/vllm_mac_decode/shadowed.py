"""An engine that prefills what came back while it rests."""

from __future__ import annotations

from typing import Any

from tests.vllm_mac_decode.engine import Engine, Prefixes
from tests.vllm_mac_decode.plain import Output, Outputs, Request

#: Blocks are of 4 tokens here, chunks of two blocks.
PROMPT = [1, 2, 3, 4, 5]
EOS = 0


class Shadowed(Engine):
    """An engine that rests between its steps, and what its shadows did."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"shadow_chunk": 8} | settings)
        self.port.idle = True

    @property
    def prefixes(self) -> Prefixes:
        assert self.port.prefixes is not None
        return self.port.prefixes

    def begin(self, name: str = "a", salt: str | None = None, **params: Any) -> int:
        """A response that the receiver decodes, its first token out."""
        request = self.add(
            name, **{"prompt": PROMPT, "max_tokens": 60, "eos_token_id": EOS} | params
        )
        request.cache_salt = salt
        number = self.schedule(name)
        self.complete(number, request.num_prompt_tokens)
        self.step(name)
        self.prefixes.compute(request.prompt_token_ids, salt)
        return number

    def receive(self, number: int, position: int, count: int, ends: bool = False) -> None:
        """The receiver decodes so many more tokens."""
        for at in range(position, position + count - ends):
            self.decode(number, at, 10 + at)
        if ends:
            self.decode(number, position + count - 1, EOS, finish="stop")

    def rest(self) -> Request | None:
        """vLLM has nothing to do; the shadow that it gets."""
        before = len(self.prefixes.queued)
        woken = -1
        # Woken, vLLM finds nothing to do and asks again.
        while self.port.woken != woken and len(self.prefixes.queued) == before:
            woken = self.port.woken
            self.relay.rest()
        assert len(self.prefixes.queued) <= before + 1, "one at a time"
        return self.prefixes.queued[-1] if len(self.prefixes.queued) > before else None

    def run(self, shadow: Request, cached: int | None = None) -> Outputs:
        """vLLM computes it in one step; returns what goes out with the step."""
        self.relay.on_new_request(shadow)  # type: ignore[arg-type]
        held = self.prefixes.find(shadow)[0]
        self.relay.scheduled(shadow.request_id, held if cached is None else cached)
        self.prefixes.compute(shadow.prompt_token_ids, shadow.cache_salt)
        return self.put_out(Output(shadow.request_id, [99], "length"))

    def run_all(self) -> list[int]:
        """Everything that an idle vLLM does by itself: where each shadow's last block ends."""
        lengths = []
        while (shadow := self.rest()) is not None:
            lengths.append(shadow.num_prompt_tokens - 1)
            self.run(shadow)
        return lengths


def conversation(*tokens: int) -> list[int]:
    return [*PROMPT, 7, *tokens]
