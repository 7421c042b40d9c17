"""Answers over HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
from starlette.responses import Response


def as_json(
    content: msgspec.Struct | Sequence[msgspec.Struct],
    status: int = 200,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """This body, and what goes with it."""
    return Response(msgspec.json.encode(content), status, headers, "application/json")
