"""Sessions that a router's prefill request has left here unclaimed, and their continuation."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from typing import Annotated, Any, Final, TypeVar

import msgspec
from msgspec import Meta

from mlx_receiver.decode.engine import DecodeEngine
from mlx_receiver.http.errors import bad_request
from mlx_receiver.http.openai.decoding import Events, decode_locally
from mlx_receiver.sessions.client import Client
from mlx_receiver.sessions.service import SessionService
from mlx_receiver.wire import trust
from mlx_receiver.wire.messages import (
    E_SESSION,
    E_UNSUPPORTED,
    Cancel,
    Decoded,
    Failed,
    Logprobs,
    ReceiverMessage,
    Start,
    Step,
    WireError,
)
from mlx_receiver.wire.ranges import MAX_LOGPROBS, Count, Logprob, TokenId
from mlx_receiver.wire.sampling import Sampling
from mlx_receiver.wire.stopping import check_stop

logger = logging.getLogger(__name__)

#: Our key in ``kv_transfer_params``.
KEY: Final = "mac_decode"
_PARAMS: Final = "kv_transfer_params"

#: Seconds that a session may be asked for before its Open has been read.
_OPEN_SECONDS: Final = 0.25
#: Seconds between looks at a session that says nothing.
_LOOK_SECONDS: Final = 1.0


class FirstLogprobs(msgspec.Struct, frozen=True):
    """``wire.messages.Logprobs`` of the first token, as JSON has it."""

    token_ids: Annotated[list[TokenId], Meta(min_length=1, max_length=MAX_LOGPROBS + 1)]
    values: Annotated[list[Logprob], Meta(min_length=1, max_length=MAX_LOGPROBS + 1)]
    rank: Count


class HandOff(msgspec.Struct, frozen=True):
    """What the prefilling vLLM says of a prompt: ``kv_transfer_params["mac_decode"]``.

    ``session`` is the number of the unclaimed session in decimal (JSON numbers lose digits in some
    proxies), None when no KV was sent. ``cached_tokens`` of the prompt were in vLLM's prefix cache.
    """

    first_token: TokenId
    prompt_token_ids: Annotated[list[TokenId], Meta(min_length=1)]
    session: Annotated[str, Meta(pattern=r"^[0-9]{1,19}\Z")] | None = None
    logprobs: FirstLogprobs | None = None
    cached_tokens: Count = 0

    @property
    def session_id(self) -> int | None:
        """The unclaimed session's number."""
        return None if self.session is None else int(self.session)


class _Transfer(msgspec.Struct, frozen=True):
    """What vLLM itself says to a decoding server in ``kv_transfer_params``."""

    prompt_token_ids: Annotated[list[TokenId], Meta(min_length=1)] | None = None


_Checked = TypeVar("_Checked", bound=msgspec.Struct)


def hand_off(params: dict[str, Any] | None, vocab_size: int) -> HandOff | None:
    """What ``kv_transfer_params`` says to this receiver, if anything. Raises ApiError."""
    ours = (params or {}).get(KEY)
    if ours is None:
        return None
    found = _checked(f"kv_transfer_params.{KEY}", ours, HandOff, vocab_size)
    session, rows = found.session_id, found.logprobs
    if session is not None and session >= 1 << 63:
        raise bad_request(f"kv_transfer_params.{KEY}.session is not below 2**63", _PARAMS)
    if rows is not None and len(rows.token_ids) != len(rows.values):
        raise bad_request(
            f"kv_transfer_params.{KEY}.logprobs has {len(rows.token_ids)} tokens and "
            f"{len(rows.values)} values",
            _PARAMS,
        )
    given = forwarded_prompt(params, vocab_size)
    if given is not None and given != found.prompt_token_ids:
        raise bad_request(
            f"kv_transfer_params has another prompt in prompt_token_ids than in {KEY}", _PARAMS
        )
    cached = (params or {}).get("remote_prefill_cached_tokens")
    if isinstance(cached, bool) or not isinstance(cached, int):
        cached = 0
    cached = min(max(cached, 0), len(found.prompt_token_ids))
    return msgspec.structs.replace(found, cached_tokens=cached)


def forwarded_prompt(params: dict[str, Any] | None, vocab_size: int) -> list[int] | None:
    """vLLM's ``kv_transfer_params["prompt_token_ids"]``: the prompt as the prefilling server has
    it, which stands for the body's own. Raises ApiError."""
    return _checked("kv_transfer_params", params or {}, _Transfer, vocab_size).prompt_token_ids


def _checked(name: str, given: Any, kind: type[_Checked], vocab_size: int) -> _Checked:
    try:
        found = msgspec.convert(given, kind)
        trust.check(found, vocab_size, E_UNSUPPORTED)
    except msgspec.ValidationError as error:
        raise bad_request(f"{name}: {error}", _PARAMS) from None
    except WireError as error:
        raise bad_request(f"{name}: {error.reason}", _PARAMS) from None
    return found


async def decode_handed_off(
    engine: DecodeEngine,
    sessions: SessionService,
    handoff: HandOff,
    sampling: Sampling,
    lost: Callable[[], None],
) -> AsyncGenerator[Decoded, None]:
    """The first token, then what follows it: from the unclaimed session's KV, else from a prefill
    here, of which ``lost`` is told.

    Closing the generator ends the session. Raises WireError.
    """
    prompt, first = handoff.prompt_token_ids, handoff.first_token
    claim = await _Claim.make(sessions, handoff, sampling)
    try:
        finish = check_stop(sampling, first, 1, len(prompt) + 1, engine.source.max_tokens)
        rows = None
        if sampling.logprobs is not None and (known := handoff.logprobs) is not None:
            rows = [Logprobs(known.token_ids, known.values, known.rank)]
        yield Decoded(0, 0, [first], finish.reason, finish.stop_reason, rows)
        if finish.reason:
            return
        try:
            if claim is not None:
                async for decoded in claim.decode():
                    yield decoded
                return
        except _Lost as loss:
            logger.warning("a hand-off was lost, the prompt is prefilled here: %s", loss)
    finally:
        if claim is not None:
            claim.release()
    lost()
    locally = decode_locally(engine, prompt, sampling, first)
    try:
        async for decoded in locally:
            yield decoded
    finally:
        await locally.aclose()


class _Lost(Exception):
    """The session ended before anything was decoded from it."""


class _Claim:
    """A session taken over from its vLLM."""

    def __init__(self, sessions: SessionService, session: int) -> None:
        self._sessions = sessions
        self._session = session
        self._events = Events()
        self._client: Client | None = None
        self._over = False

    @classmethod
    async def make(
        cls, sessions: SessionService, handoff: HandOff, sampling: Sampling
    ) -> _Claim | None:
        """The claim, or None when there is no such session; decoding starts at once."""
        session = handoff.session_id
        if session is None:
            return None
        claim = cls(sessions, session)
        until = time.monotonic() + _OPEN_SECONDS
        while True:
            try:
                claim._client = sessions.claim(
                    session, handoff.prompt_token_ids, sampling, claim._post
                )
                sessions.start(claim._client, Start(session, handoff.first_token))
                return claim
            except WireError as error:
                # Its Open travels on another connection than the HTTP request.
                if claim._client is not None or time.monotonic() > until:
                    logger.warning("session %d: %s; prefilling here", session, error.reason)
                    claim.release()
                    return None
            await asyncio.sleep(0.02)

    async def decode(self) -> AsyncGenerator[Decoded, None]:
        """What follows the first token. Raises _Lost before the first of it, WireError later."""
        started = False
        while not self._over:
            try:
                decoded = await self._events.get(_LOOK_SECONDS)
            except (TimeoutError, WireError) as error:
                failure = error if isinstance(error, WireError) else None
                if failure is None and self._sessions.store.get(self._session) is not None:
                    continue
                # Without a failure its end and the claim crossed: nobody was told.
                failure = failure or WireError(E_SESSION, "the session has ended")
                self._over = True
                raise failure if started else _Lost(failure.reason) from error
            started = True
            self._over = bool(decoded.finish)
            yield decoded

    def release(self) -> None:
        """End the session unless it has ended."""
        if not self._over and self._client is not None:
            self._over = True
            self._sessions.cancel(self._client, Cancel(self._session))

    def _post(self, message: ReceiverMessage) -> None:
        if isinstance(message, Step):
            for decoded in message.decoded:
                self._events.put(decoded)
        elif isinstance(message, Failed):
            self._events.put(WireError(message.code, message.reason))
