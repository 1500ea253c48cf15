"""GET /v1/models: the model and its aliases, with the quality that was measured at each expert count.

The list has them twice: as `data` for OpenAI's clients, and as `models` for Codex.
"""

from typing import Any

from fastapi import APIRouter, Request

from server.formats.codex_models import codex_models
from server.service import Service

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("")
async def models(request: Request) -> dict[str, Any]:
    service: Service = request.app.state.service
    cards = list(service.served_models.cards())
    return {"object": "list", "data": cards, "models": codex_models(cards)}


@router.get("/{model_id:path}")
async def model(request: Request, model_id: str) -> dict[str, Any]:
    service: Service = request.app.state.service
    return service.served_models.card(model_id)
