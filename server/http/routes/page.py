"""GET / and /page/…: the page on which people ask the model and compare expert counts. `--page off` leaves them out.

They are open where the server has keys: the files hold no data, and the page asks for a key when it needs one.
"""

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from server.http.page_files import FILES, PageFile

router = APIRouter(include_in_schema=False)
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # ask every time, by tag: files of two versions never meet
    "vary": "accept-encoding",
}


@router.get("/")
async def index(request: Request) -> Response:
    return _answer(request, FILES["/"])


@router.get("/page/{name:path}")
async def file(request: Request, name: str) -> Response:
    found = FILES.get(f"/page/{name}")
    if found is None:
        raise HTTPException(404)
    return _answer(request, found)


def _answer(request: Request, found: PageFile) -> Response:
    headers = HEADERS | {"etag": found.tag}
    if found.tag.removeprefix("W/") in _listed(request.headers.get("if-none-match", "")):
        return Response(status_code=304, headers=headers)
    if "gzip" not in _listed(request.headers.get("accept-encoding", "")):
        return Response(found.data, media_type=found.media_type, headers=headers)
    return Response(found.compressed, media_type=found.media_type, headers=headers | {"content-encoding": "gzip"})


def _listed(value: str) -> set[str]:
    """The entries of a header that is a list, without parameters and marks of weakness; `q=0` takes one out."""
    entries = [entry.strip().removeprefix("W/") for entry in value.split(",")]
    return {entry.partition(";")[0].strip() for entry in entries if not entry.replace(" ", "").endswith(";q=0")}
