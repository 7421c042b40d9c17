"""The routes of Anthropic's Messages API."""

from __future__ import annotations

from starlette.routing import BaseRoute

from mlx_receiver.http.anthropic.answer import count_tokens, messages
from mlx_receiver.http.openai.routes import route
from mlx_receiver.http.openai.service import Service


def messages_routes(service: Service) -> list[BaseRoute]:
    """Everything of the Messages API."""
    return [
        route(service, "/v1/messages", messages),
        route(service, "/v1/messages/count_tokens", count_tokens),
    ]
