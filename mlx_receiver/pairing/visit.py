"""The Spark's side of pairing: visits a receiver over HTTP with the code that it shows."""

from __future__ import annotations

import contextlib
import socket
import time
from typing import Final, TypeVar

import httpx
import msgspec

from mlx_receiver.pairing.exchange import Answer, Card, Guest, digits
from mlx_receiver.pairing.keystore import Keystore, PairingError, Peer
from mlx_receiver.wire.addresses import Address, spelled, try_each
from mlx_receiver.wire.seldom import printable

_SECONDS: Final = 10.0
_MAX_ANSWER: Final = 16 << 10
_DIGITS: Final = 8

_Message = TypeVar("_Message", bound=msgspec.Struct)


class Unreachable(PairingError):
    """Nothing answers at that address."""


def pair(keystore: Keystore, host: str, port: int, http_port: int, code: str) -> Peer:
    """Pair this machine with the receiver whose control port is ``host:port``, and remember it.

    Raises PairingError saying what to do.
    """
    if len(digits(code)) != _DIGITS:
        raise PairingError(f"a code has {_DIGITS} digits, as the receiver shows it: 1234-5678")
    identity = keystore.identity()
    me = Peer(socket.gethostname(), identity.public)
    with contextlib.closing(_reached(host, http_port)) as http:
        guest = Guest(code)
        answer = _asked(http, "/pair/greeting", guest.greeting(), Answer)
        try:
            host_card = guest.answered(answer)
        except PairingError as error:
            raise PairingError(
                f"{error}: three wrong ones and the receiver forgets it; `mlx-receiver pair` on "
                "its machine shows another"
            ) from None
        _asked(http, "/pair/closing", guest.closing(answer.attempt, me), None)
    peer = msgspec.structs.replace(host_card, address=spelled(host, port))
    keystore.add(peer)
    return peer


def card(host: str, http_port: int) -> Card:
    """What a receiver says of itself. Raises PairingError."""
    with contextlib.closing(_reached(host, http_port)) as http:
        return _asked(http, "/pair", None, Card)


def _reached(host: str, port: int) -> httpx.Client:
    """A client for the first of the host's addresses that answers. Raises PairingError."""

    def attempt(address: Address, until: float) -> httpx.Client:
        # In numbers: a receiver does not know by which names it is called.
        numeric = address.text.replace("%", "%25")
        http = httpx.Client(base_url=f"http://{numeric}", timeout=_SECONDS, follow_redirects=False)
        try:
            http.get("/health", timeout=max(until - time.monotonic(), 0.01))
        except httpx.HTTPError as error:
            http.close()
            raise OSError(f"{address.text}: {error}") from None
        return http

    try:
        return try_each(host, port, _SECONDS, attempt)
    except (OSError, UnicodeError) as error:
        raise Unreachable(
            f"no receiver answers at {spelled(host, port)} ({error}): is `mlx-receiver start` "
            "running there, does its firewall let it listen, and is this its --http-port?"
        ) from None


def _asked(
    http: httpx.Client, path: str, body: msgspec.Struct | None, kind: type[_Message] | None
) -> _Message:
    """The answer, or what the receiver says instead as a PairingError."""
    headers = {"Content-Type": "application/json"}
    content = None if body is None else msgspec.json.encode(body)
    try:
        method = "GET" if body is None else "POST"
        with http.stream(method, path, content=content, headers=headers) as answer:
            read = b""
            for chunk in answer.iter_bytes(_MAX_ANSWER):
                read += chunk
                if len(read) > _MAX_ANSWER:
                    break
    except httpx.HTTPError as error:
        raise PairingError(f"the receiver broke off: {error}") from None
    if answer.status_code == 404:
        raise PairingError("that receiver's version cannot pair: upgrade it, or use a token")
    if answer.status_code != 200:
        raise PairingError(_reason(read) or f"the receiver answers {answer.status_code}")
    if kind is None:
        return None  # type: ignore[return-value]
    try:
        return msgspec.json.decode(read, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise PairingError("another program answers there, no receiver") from None


class _Detail(msgspec.Struct):
    message: str


class _Error(msgspec.Struct):
    """What the receiver's HTTP server says instead of an answer."""

    error: _Detail


def _reason(body: bytes) -> str:
    try:
        return printable(msgspec.json.decode(body, type=_Error).error.message)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return ""
