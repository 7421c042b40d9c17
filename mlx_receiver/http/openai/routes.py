"""The API's routes."""

from __future__ import annotations

import functools

from starlette.routing import BaseRoute, Route

from mlx_receiver.http.openai.chat import chat_completions
from mlx_receiver.http.openai.completions import completions
from mlx_receiver.http.openai.models import models
from mlx_receiver.http.openai.service import Service


def api_routes(service: Service) -> list[BaseRoute]:
    """Everything under ``/v1``."""
    endpoints = (
        ("/v1/models", models, "GET"),
        ("/v1/completions", completions, "POST"),
        ("/v1/chat/completions", chat_completions, "POST"),
    )
    return [
        Route(path, functools.partial(handler, service), methods=[method])
        for path, handler, method in endpoints
    ]
