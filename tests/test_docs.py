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


def test_functions_that_are_linked_are_in_their_files() -> None:
    """The way of the expert count is told as links to functions: 25 on the native kernels, two of plain torch."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    functions = re.findall(r"\[`([\w.:]+)`\]\(\.\./([\w./]+\.(?:py|h))\)", page)
    for name, file in functions:
        words = re.split(r"\.|::", name)
        assert all(re.search(rf"\b{word}\b", (ROOT / file).read_text()) for word in words), f"{name} is not in {file}"
    way = page.partition("### Where does")[2].partition("## Families")[0]
    assert len(re.findall(r"\]\(\.\./", way)) == 25 + 2


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.name)
def test_links_lead_to_files(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"
    for target in re.findall(
        r"`((?:docs|tests|benchmarks|model|engine|server|weights|training|terminal)/[\w./-]*\w)`", path.read_text()
    ):
        assert (ROOT / target).exists(), f"{path.name} names {target}"
