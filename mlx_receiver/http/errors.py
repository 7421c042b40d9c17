"""Errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``; under
``/v1/messages`` in Anthropic's: ``{"type": "error", "error": {"type", "message"}}``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

import msgspec
from starlette.responses import Response

from mlx_receiver.http.replies import as_json
from mlx_receiver.wire.messages import E_CAPACITY, E_SHUTDOWN, E_UNSUPPORTED, WireError

_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "BadRequestError",
    413: "BadRequestError",
    415: "BadRequestError",
    429: "RateLimitError",
    503: "ServiceUnavailableError",
}

_ANTHROPIC_PATH: Final = "/v1/messages"
#: Anthropic's names; its clients tell errors by them.
_ANTHROPIC_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ErrorDetail(msgspec.Struct, frozen=True):
    """What was wrong; ``param`` names the field at fault, ``code`` is the HTTP status."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorBody(msgspec.Struct, frozen=True):
    """What is sent instead of an answer."""

    error: ErrorDetail


class AnthropicErrorDetail(msgspec.Struct, frozen=True):
    """What was wrong."""

    type: str
    message: str


class AnthropicErrorBody(msgspec.Struct, frozen=True, tag="error"):
    """What is sent instead of an answer, or within a stream."""

    error: AnthropicErrorDetail


class ApiError(Exception):
    """What a client is told instead of an answer; ``param`` names the field at fault."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param

    def body(self) -> ErrorBody:
        """What is sent."""
        kind = _TYPES.get(self.status, "InternalServerError")
        return ErrorBody(ErrorDetail(self.message, kind, self.param, self.status))

    def anthropic_body(self) -> AnthropicErrorBody:
        """The same for a client of Anthropic's API."""
        kind = "invalid_request_error" if self.status < 500 else "api_error"
        kind = _ANTHROPIC_TYPES.get(self.status, kind)
        return AnthropicErrorBody(AnthropicErrorDetail(kind, self.message))

    def renamed(self, names: Mapping[str, str]) -> ApiError:
        """The same with fields called as the client calls them."""

        def other(found: re.Match[str]) -> str:
            return names[found.group()]

        known = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b")
        param = self.param and names.get(self.param, self.param)
        return ApiError(self.status, known.sub(other, self.message), param)

    def response(self, path: str = "") -> Response:
        """The HTTP answer, in the words of the API to which the request's path belongs."""
        headers = None
        if self.status == 401:
            headers = {"WWW-Authenticate": "Bearer"}
        elif self.status in (429, 503):
            headers = {"Retry-After": "1"}
        anthropic = path == _ANTHROPIC_PATH or path.startswith(f"{_ANTHROPIC_PATH}/")
        body = self.anthropic_body() if anthropic else self.body()
        return as_json(body, self.status, headers)


def bad_request(message: str, param: str | None = None) -> ApiError:
    """A field that cannot be honoured."""
    return ApiError(400, message, param)


def refuse(refused: Mapping[str, bool], **details: str) -> None:
    """Raise ApiError for the first field of which that is true; ``details`` say of some when."""
    for name, is_refused in refused.items():
        if is_refused:
            detail = details.get(name, "")
            raise bad_request(f"{name}{detail} is not supported by this receiver", name)


def from_wire(error: WireError) -> ApiError:
    """What the decoding side said, as an HTTP error."""
    if error.code == E_UNSUPPORTED:
        return ApiError(400, error.reason)
    if error.code in (E_CAPACITY, E_SHUTDOWN):
        return ApiError(503, error.reason)
    return ApiError(500, error.reason)
