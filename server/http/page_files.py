"""The files of the page that the server shows at `/`, read once: bytes, compressed bytes, types and tags.

Not here: the routes that send them (see `server/http/routes/page.py`) and the page itself (see `server/page/`).
"""

import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "page"
INDEX = "index.html"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".md": "text/markdown; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
}


@dataclass(frozen=True, slots=True)
class PageFile:
    """One file. `tag` changes with its bytes, and is weak, since it stands for both forms."""

    media_type: str
    data: bytes
    compressed: bytes
    tag: str


def _read(path: Path) -> PageFile:
    data = path.read_bytes()
    tag = f'W/"{hashlib.sha256(data).hexdigest()[:32]}"'
    return PageFile(TYPES[path.suffix], data, gzip.compress(data, mtime=0), tag)


def _read_all() -> dict[str, PageFile]:
    """Every file by the path under which the page asks for it."""
    found = {path.relative_to(FOLDER).as_posix(): path for path in sorted(FOLDER.rglob("*")) if path.is_file()}
    return {"/" if name == INDEX else f"/page/{name}": _read(path) for name, path in found.items()}


FILES = _read_all()
PATHS = frozenset(FILES)
