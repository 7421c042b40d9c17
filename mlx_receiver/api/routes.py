"""The API's routes."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from starlette.routing import BaseRoute, Route

from mlx_receiver.api.chat import chat_completions
from mlx_receiver.api.completions import completions
from mlx_receiver.api.models import models
from mlx_receiver.api.service import Service

if TYPE_CHECKING:
    from mlx_receiver.receiver import Receiver


def api_routes(receiver: Receiver) -> list[BaseRoute]:
    """Everything under ``/v1``."""
    service = Service(receiver)
    endpoints = (
        ("/v1/models", models, "GET"),
        ("/v1/completions", completions, "POST"),
        ("/v1/chat/completions", chat_completions, "POST"),
    )
    return [
        Route(path, functools.partial(handler, service), methods=[method])
        for path, handler, method in endpoints
    ]
