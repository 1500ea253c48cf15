"""GET /v1/models: the models and their aliases, with the quality that was measured at each expert count.

The list has them twice: as `data` for OpenAI's clients, and as `models` for Codex.
"""

from typing import Any

from fastapi import APIRouter, Request

from server.formats.codex_models import codex_models
from server.http.serving import server_of

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("")
async def models(request: Request) -> dict[str, Any]:
    cards = server_of(request).model_cards()
    return {"object": "list", "data": cards, "models": codex_models(cards)}


@router.get("/{model_id:path}")
async def model(request: Request, model_id: str) -> dict[str, Any]:
    return server_of(request).model_card(model_id)
