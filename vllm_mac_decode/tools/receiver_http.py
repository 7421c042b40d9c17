"""Asking a receiver over HTTP; what goes wrong is said in words."""

from __future__ import annotations

from typing import TypeVar

import httpx
import msgspec

_Kind = TypeVar("_Kind")


class HttpError(Exception):
    """There is no answer that could be used; the text says why and what to do."""


class NoAnswer(HttpError):
    """Nobody answers there."""


def client(api_key: str = "", seconds: float = 10) -> httpx.Client:
    """A client for machines of one's own: no proxy of the environment comes in between."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return httpx.Client(timeout=seconds, headers=headers, trust_env=False)


def get(base: str, path: str, kind: type[_Kind], api_key: str = "") -> _Kind:
    """The JSON of ``GET path``. Raises HttpError, and NoAnswer where nothing answers."""
    try:
        with client(api_key) as http:
            answer = http.get(f"{base}{path}")
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            raise HttpError(
                f"{base} wants a key: --api-key or MLX_RECEIVER_API_KEY with the receiver's own"
            )
        return msgspec.json.decode(answer.raise_for_status().content, type=kind)
    except httpx.InvalidURL as error:
        raise HttpError(f"{base} is no address: {error}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise HttpError(f"{base} is not a receiver's HTTP address") from None
    except httpx.HTTPError as error:
        raise NoAnswer(f"no receiver answers at {base} ({error})") from None
