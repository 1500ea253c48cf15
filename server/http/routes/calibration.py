"""GET /calibration: what was measured of the model at each expert count, as JSON or as a picture.

It needs a key where the server has keys, as /v1/models does, which holds the same figures in short.
"""

from fastapi import APIRouter, Request
from starlette.responses import Response

from model.errors import InvalidRequest, shown
from server.http.serving import service_of

router = APIRouter(tags=["models"])
SVG, JSON = "image/svg+xml", "application/json"
TYPES = {"svg": SVG, "json": JSON}
HEADERS = {
    "x-content-type-options": "nosniff",
    # opened as a page of its own, the picture can load and run nothing
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "vary": "accept",
}


@router.get("/calibration")
async def calibration(request: Request, format: str | None = None) -> Response:
    """The whole calibration; `format=svg` or an Accept header that asks for it gives the picture."""
    service = service_of(request)
    media_type = _media_type(format, request.headers.get("accept", ""))
    served = service.described.calibration
    content = served.svg if media_type == SVG else served.json
    return Response(content, media_type=media_type, headers=HEADERS)


def _media_type(format: str | None, accept: str) -> str:
    """The type to answer with: the one that is named, else SVG for those who list it and not JSON."""
    if format is None:
        return SVG if SVG in accept and JSON not in accept else JSON
    if format not in TYPES:
        raise InvalidRequest(f'format must be "json" or "svg", got {shown(format)}', "format")
    return TYPES[format]
