"""The front door: asking a vLLM for the prefill of prompts that are long enough to pay for it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any, Final

import httpx
import msgspec

from mlx_receiver.http.errors import ApiError
from mlx_receiver.http.openai.claims import HandOff, hand_off
from mlx_receiver.wire.sampling import Sampling

logger = logging.getLogger(__name__)

#: What routers send to a prefill server.
_TRANSFER: Final = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}

#: Seconds for reaching vLLM at all.
_CONNECT_SECONDS: Final = 2.0
#: After a failure this long prompts are prefilled here without asking.
_PAUSE_SECONDS: Final = 5.0


class Prefill:
    """A client of one vLLM, with the protocol that routers speak. One event loop only."""

    def __init__(
        self, base: str, api_key: str, min_tokens: int, seconds: float, vocab_size: int
    ) -> None:
        self._vocab_size = vocab_size
        self._min_tokens = min_tokens
        self._base = base.rstrip("/")
        self._seconds = seconds
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(seconds, connect=min(_CONNECT_SECONDS, seconds)),
        )
        self._model: str | None = None
        self._not_before = 0.0

    async def __aenter__(self) -> Prefill:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self._http.aclose()

    def pays(self, prompt: list[int], sampling: Sampling) -> bool:
        """Whether vLLM should be asked. Its API takes bad words as text only, its own grammar for
        the first token may be another, and so may what ends the reasoning."""
        own = sampling.grammar is not None or sampling.thinking is not None
        as_it_is = not sampling.bad_words_token_ids and not own
        return len(prompt) >= self._min_tokens and as_it_is

    async def ask(self, prompt: list[int], sampling: Sampling, salt: str = "") -> HandOff | None:
        """vLLM's hand-off of the prompt, or None when it is gone, slow or cannot do it. ``salt``:
        the client's ``cache_salt``."""
        now = asyncio.get_running_loop().time()
        if now < self._not_before:
            return None
        try:
            async with asyncio.timeout(self._seconds):
                return await self._ask(prompt, sampling, salt)
        except (TimeoutError, httpx.HTTPError, msgspec.MsgspecError, ApiError, _Unusable) as error:
            said = str(error) or type(error).__name__
            logger.warning("no prefill from %s, prefilling here: %s", self._base, said)
            self._model = None
            if isinstance(error, httpx.TransportError | TimeoutError):
                self._not_before = asyncio.get_running_loop().time() + _PAUSE_SECONDS
            return None

    async def _ask(self, prompt: list[int], sampling: Sampling, salt: str) -> HandOff:
        http = self._http
        if self._model is None:
            listed = _checked(await http.get(f"{self._base}/v1/models"))
            with contextlib.suppress(KeyError, IndexError, TypeError):
                self._model = listed["data"][0]["id"]
        body = self._body(prompt, sampling) | ({"cache_salt": salt} if salt else {})
        answer = await http.post(f"{self._base}/v1/completions", json=body)
        handoff = hand_off(_checked(answer).get("kv_transfer_params"), self._vocab_size)
        if handoff is None:
            raise _Unusable("it runs without the mac_decode connector")
        if handoff.prompt_token_ids != prompt:
            raise _Unusable("it answered for another prompt")
        return handoff

    def _body(self, prompt: list[int], sampling: Sampling) -> dict[str, Any]:
        """A request for the first token, sampled as the client wants it."""
        s = sampling
        fields: dict[str, Any] = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": 1,
            "min_tokens": min(1, s.min_tokens),
            "stream": False,
            "temperature": s.temperature,
            "top_p": s.top_p,
            "top_k": s.top_k,
            "min_p": s.min_p,
            "seed": s.seed,
            "repetition_penalty": s.repetition_penalty,
            "presence_penalty": s.presence_penalty,
            "frequency_penalty": s.frequency_penalty,
            "logit_bias": {str(k): v for k, v in (s.logit_bias or {}).items()} or None,
            "allowed_token_ids": s.allowed_token_ids,
            "logprobs": s.logprobs,
            "logprob_token_ids": s.logprob_token_ids or None,
            "stop_token_ids": s.stop_token_ids,
            "ignore_eos": s.eos_token_id is None,
            "kv_transfer_params": _TRANSFER,
        }
        return {name: value for name, value in fields.items() if value is not None}


class _Unusable(Exception):
    """What vLLM answers is of no use here."""


def _checked(answer: httpx.Response) -> dict[str, Any]:
    if answer.status_code != 200:
        raise _Unusable(f"HTTP {answer.status_code}: {answer.text[:200]}")
    return msgspec.json.decode(answer.content, type=dict[str, Any])
