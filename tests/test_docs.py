"""Generated docs are what the code says now, and the links of hand-written ones lead somewhere."""

import re
from pathlib import Path

import pytest

from docs.generate import pages

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md", ".github/PULL_REQUEST_TEMPLATE.md")
WRITTEN = [*(ROOT / page for page in PAGES), *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.name)
def test_generated_page_is_current(path: Path) -> None:
    assert path.read_text() == pages()[path], "run `make docs`"


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.name)
def test_links_lead_to_files(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"
    for target in re.findall(
        r"`((?:docs|tests|benchmarks|model|engine|server|weights|training|terminal)/[\w./-]*\w)`", path.read_text()
    ):
        assert (ROOT / target).exists(), f"{path.name} names {target}"
