"""The API's routes."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from mlx_receiver.http.openai.chat import chat_completions
from mlx_receiver.http.openai.completions import completions
from mlx_receiver.http.openai.models import models
from mlx_receiver.http.openai.service import Service

Handler = Callable[[Service, Request], Awaitable[Response]]


def api_routes(service: Service) -> list[BaseRoute]:
    """Models, completions and chat completions."""
    return [
        route(service, "/v1/models", models, "GET"),
        route(service, "/v1/completions", completions),
        route(service, "/v1/chat/completions", chat_completions),
    ]


def route(service: Service, path: str, handler: Handler, method: str = "POST") -> Route:
    """An endpoint."""
    return Route(path, functools.partial(handler, service), methods=[method])
