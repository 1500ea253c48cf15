"""GET /docs: a page that shows /openapi.json and sends requests. It loads nothing from the network.

The page is open where the server has keys: it holds no data, and fetches the document with the key that is entered.
"""

import hashlib
import re
from base64 import b64encode
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import HTMLResponse

router = APIRouter()
PAGE = (Path(__file__).parent / "docs.html").read_text()


def _policy() -> str:
    """A content security policy that allows the page's own script and style and nothing else."""
    parts = re.findall(r"<(script|style)>(.*?)</\1>", PAGE, re.DOTALL)
    hashes = {kind: _digest(text) for kind, text in parts}
    own = "; ".join(f"{kind}-src 'sha256-{digest}'" for kind, digest in hashes.items())
    return f"default-src 'none'; {own}; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def _digest(text: str) -> str:
    return b64encode(hashlib.sha256(text.encode()).digest()).decode()


HEADERS = {"content-security-policy": _policy(), "referrer-policy": "no-referrer", "x-content-type-options": "nosniff"}


@router.get("/docs", include_in_schema=False)
async def docs() -> HTMLResponse:
    return HTMLResponse(PAGE, headers=HEADERS)
