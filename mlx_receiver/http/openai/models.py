"""``GET /v1/models``."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from mlx_receiver.http.openai.replies import as_json
from mlx_receiver.http.openai.service import Service


async def models(service: Service, _request: Request) -> Response:
    """The one model that is served."""
    card = {
        "id": service.model,
        "object": "model",
        "created": service.created,
        "owned_by": "mlx-receiver",
        "root": service.source.name,
        "parent": None,
        "max_model_len": service.source.max_tokens,
    }
    return as_json({"object": "list", "data": [card]})
