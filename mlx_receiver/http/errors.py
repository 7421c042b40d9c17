"""Errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

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


class ErrorDetail(msgspec.Struct, frozen=True):
    """What was wrong; ``param`` names the field at fault, ``code`` is the HTTP status."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorBody(msgspec.Struct, frozen=True):
    """What is sent instead of an answer."""

    error: ErrorDetail


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

    def response(self) -> Response:
        """The HTTP answer."""
        headers = None
        if self.status == 401:
            headers = {"WWW-Authenticate": "Bearer"}
        elif self.status in (429, 503):
            headers = {"Retry-After": "1"}
        return as_json(self.body(), self.status, headers)


def bad_request(message: str, param: str | None = None) -> ApiError:
    """A field that cannot be honoured."""
    return ApiError(400, message, param)


def from_wire(error: WireError) -> ApiError:
    """What the decoding side said, as an HTTP error."""
    if error.code == E_UNSUPPORTED:
        return ApiError(400, error.reason)
    if error.code in (E_CAPACITY, E_SHUTDOWN):
        return ApiError(503, error.reason)
    return ApiError(500, error.reason)
