"""``GET /v1/models``."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from mlx_receiver.http.openai.responses import ModelCard, ModelList
from mlx_receiver.http.openai.service import Service
from mlx_receiver.http.replies import as_json


async def models(service: Service, _request: Request) -> Response:
    """The one model that is served."""
    card = ModelCard(
        id=service.model,
        created=service.created,
        root=service.source.name,
        max_model_len=service.source.max_tokens,
    )
    return as_json(ModelList(data=[card]))
