"""GET /calibration: what was measured of the model at each expert count.

It needs a key where the server has keys, as /v1/models does, which holds the same figures in short.
"""

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.service import Service

router = APIRouter(tags=["models"])


@router.get("/calibration")
async def calibration(request: Request) -> Response:
    """The whole calibration."""
    service: Service = request.app.state.service
    return Response(service.served_models.calibration.json, media_type="application/json")
