"""Who may ask: browsers of other sites, other machines, and clients without the API key may not."""

from __future__ import annotations

import hmac
import ipaddress
import socket
import time
from collections import OrderedDict
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from mlx_receiver.http.errors import ApiError
from mlx_receiver.settings import Settings, is_loopback
from mlx_receiver.wire.addresses import is_this_machine

#: Wrong API keys that an address may show at once, and how many more each second.
_WRONG_KEYS: Final = 20
_WRONG_KEYS_PER_SECOND: Final = 0.5
#: Addresses whose wrong keys are remembered.
_ADDRESSES: Final = 4096

_DEFAULT_PORTS: Final = {"http": 80, "https": 443}


class Access:
    """Middleware that refuses strangers before anything else of a request is looked at.

    ``/health`` answers everybody; ``scope["state"]["trusted"]`` says whether with details.
    Pairing is for those who have no key yet. Without an API key the others are for this machine.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._api_key = settings.api_key.encode()
        self._local = is_loopback(settings.host)
        names = {settings.host, "localhost", socket.gethostname(), socket.getfqdn()}
        self._names = {name.lower() for name in names | set(settings.hosts)}
        self._attempts = _Attempts()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._check(scope)
        except ApiError as error:
            await error.response(scope["path"])(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        self._check_host(headers)
        _check_origin(headers)
        path = scope["path"]
        if path == "/pair" or path.startswith("/pair/"):
            _check_media(scope, headers)
            return
        shown = self._shows_key(scope, headers)
        needed = bool(self._api_key) or not (self._local or _from_here(scope))
        if path in ("/health", "/metrics", "/handoffs") or path.startswith("/handoffs/"):
            needed = not (self._local or (not self._api_key and _from_here(scope)))
        scope["state"]["trusted"] = shown or not needed
        if needed and not shown and path != "/health":
            if not self._api_key:
                raise ApiError(
                    403,
                    "only the receiver's own machine may use its API: start it with --api-key KEY "
                    "for others",
                )
            raise ApiError(
                401, "wrong or missing API key: send Authorization: Bearer KEY, or x-api-key: KEY"
            )
        _check_media(scope, headers)

    def _check_host(self, headers: Headers) -> None:
        """A name that a stranger owns may point here: a page of theirs would be at home."""
        hosts = headers.getlist("host")
        names = [_hostname(host) for host in hosts]
        if not all(n in self._names or n.endswith(".local") or _is_address(n) for n in names):
            raise ApiError(
                421,
                "this receiver does not answer to the name in the Host header: use its address, or "
                "allow the name with --allowed-hosts",
            )

    def _shows_key(self, scope: Scope, headers: Headers) -> bool:
        """Raises ApiError (429) instead of looking at a key when there were too many wrong ones."""
        given = _keys(headers)
        if not self._api_key or not given:
            return False
        connection = scope["state"]["connection"]
        address = scope["client"][0] if scope.get("client") else ""
        if not connection.proved and not self._attempts.allowed(address):
            raise ApiError(429, "too many wrong API keys from this address: try again later")
        right = [hmac.compare_digest(key.encode(), self._api_key) for key in given]
        connection.proved = any(right)
        for _ in () if connection.proved else given:
            self._attempts.failed(address)
        return bool(connection.proved)


def _keys(headers: Headers) -> list[str]:
    """The API keys that a request shows: OpenAI's clients say ``Authorization``, Anthropic's
    ``x-api-key``, or both."""
    found = []
    if (given := headers.get("authorization")) is not None:
        kind, _, key = given.partition(" ")
        # Another kind's credentials are a wrong key.
        found.append(key.strip() if kind.lower() == "bearer" else "")
    if (given := headers.get("x-api-key")) is not None:
        found.append(given.strip())
    return found


class _Attempts:
    """Wrong keys by address: a bucket for each, which empties slowly."""

    def __init__(self) -> None:
        self._wrong: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def allowed(self, address: str) -> bool:
        """Whether a key of this address may be compared."""
        return self._level(_network(address)) < _WRONG_KEYS

    def failed(self, address: str) -> None:
        """Count a wrong key."""
        network = _network(address)
        self._wrong[network] = (self._level(network) + 1, time.monotonic())
        self._wrong.move_to_end(network)
        if len(self._wrong) > _ADDRESSES:
            self._wrong.popitem(last=False)

    def _level(self, network: str) -> float:
        level, at = self._wrong.get(network, (0.0, 0.0))
        return max(0.0, level - (time.monotonic() - at) * _WRONG_KEYS_PER_SECOND)


def _network(address: str) -> str:
    """The address, or of IPv6 the 64 bits that a single machine cannot choose."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    return address if found.version == 4 else found.exploded[:19]


def _check_media(scope: Scope, headers: Headers) -> None:
    """A browser sends forms to other sites without asking, JSON it does not."""
    if scope["method"] == "POST":
        media = headers.get("content-type", "").partition(";")[0].strip().lower()
        if media != "application/json":
            raise ApiError(415, "send the body as Content-Type: application/json")


def _from_here(scope: Scope) -> bool:
    """Whether the request comes from this machine."""
    client = scope.get("client")
    return client is not None and is_this_machine(client[0])


def _check_origin(headers: Headers) -> None:
    """Browsers say whose page asks. Raises ApiError (403) for another site's."""
    foreign = headers.get("sec-fetch-site", "none").lower() not in ("none", "same-origin")
    for origin in headers.getlist("origin"):
        asked = f"{origin.partition(':')[0]}://{headers.get('host', '')}"
        foreign = foreign or _authority(origin) is None or _authority(origin) != _authority(asked)
    if foreign:
        raise ApiError(403, "pages of other sites may not use this receiver")


def _authority(url: str) -> tuple[str, int | None] | None:
    """Host and port; None for what is no URL."""
    try:
        parts = urlsplit(url)
        if not parts.hostname:
            return None
        return parts.hostname, parts.port or _DEFAULT_PORTS.get(parts.scheme)
    except ValueError:
        return None


def _hostname(host: str) -> str:
    """A Host header without its port and brackets; "" for nonsense."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
