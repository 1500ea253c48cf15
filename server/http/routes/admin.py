"""The operator's routes, where several models are served and --admin-key is set: load a model, or unload it."""

from typing import Any

from fastapi import APIRouter, Request

from server.access.keys import Keys
from server.errors import Unauthorized
from server.http.auth import credentials
from server.http.serving import hosted_models_of

PREFIX = "/admin/"
router = APIRouter(prefix="/admin/models", include_in_schema=False)


@router.get("")
async def models(request: Request) -> dict[str, Any]:
    """Which models are in memory, and what each takes there."""
    _check_key(request)
    return {"data": hosted_models_of(request).residences()}


@router.post("/{name:path}/load")
async def load(request: Request, name: str) -> dict[str, Any]:
    """Load a model, and wait for it; where it is there already, nothing is done."""
    _check_key(request)
    models = hosted_models_of(request)
    service = models.service_of(name)
    async with models.using(service, again=True):
        return models.residence(service)


@router.post("/{name:path}/unload")
async def unload(request: Request, name: str) -> dict[str, Any]:
    """Unload a model that no request uses."""
    _check_key(request)
    models = hosted_models_of(request)
    service = models.service_of(name)
    await models.unload(service)
    return models.residence(service)


def _check_key(request: Request) -> None:
    """Raises Unauthorized unless the request brings the operator's key, and that one only."""
    keys: Keys = request.app.state.admin_keys
    given = set(credentials(request.scope["headers"]))
    if len(given) != 1 or keys.name_of(given.pop()) is None:
        raise Unauthorized("the operator's key is needed: Authorization: Bearer KEY, or x-api-key: KEY")
