"""GET /v1/models: the model and its aliases, with the quality that was measured at each expert count."""

from typing import Any

from fastapi import APIRouter, Request

from server.service import Service

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("")
async def models(request: Request) -> dict[str, Any]:
    service: Service = request.app.state.service
    return {"object": "list", "data": list(service.served_models.cards())}


@router.get("/{model_id:path}")
async def model(request: Request, model_id: str) -> dict[str, Any]:
    service: Service = request.app.state.service
    return service.served_models.card(model_id)
