"""The route of OpenAI's Responses API."""

from __future__ import annotations

from starlette.routing import BaseRoute

from mlx_receiver.http.openai.routes import route
from mlx_receiver.http.openai.service import Service
from mlx_receiver.http.responses.answer import responses


def responses_routes(service: Service) -> list[BaseRoute]:
    """Everything of the Responses API."""
    return [route(service, "/v1/responses", responses)]
