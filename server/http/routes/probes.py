"""Probes: /live (the process runs), /health (the model answers), /ready (accepts work), /version, /metrics.

They need no key.
"""

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from server.http.serving import server_of
from server.version import VERSION

router = APIRouter(tags=["probes"])


@router.get("/live")
async def live() -> dict[str, str]:
    """The HTTP process runs; always 200. For an orchestrator that restarts a server that does not answer."""
    return {"status": "alive"}


@router.get("/health")
async def health(request: Request) -> dict[str, str]:
    """503 while the model loads and while the engine is down. Draining is still healthy."""
    server_of(request).check_engine()
    return {"status": "ok"}


@router.get("/ready")
async def ready(request: Request) -> dict[str, str]:
    """503 while the model loads, while the engine is down and while the server drains."""
    server_of(request).check_ready()
    return {"status": "ready"}


@router.get("/version")
async def version_() -> dict[str, str]:
    return {"version": VERSION}


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    return Response(server_of(request).exposition(), media_type=CONTENT_TYPE_LATEST)
