"""Generated docs are what the code says now, and the links of hand-written ones lead somewhere."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from msgspec import structs

from docs.calibrated import card_section, counts_table, dial_section, options_table, readme_section
from docs.curve import svg
from docs.generate import filled, pages
from tests.server.calibrations import calibration

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


def test_generated_tables_say_what_a_calibration_says() -> None:
    found = calibration()
    names = {"infinity-stories": found, "topk-stories": found}
    assert "| 1 | 500 | 1.600 | , there was" in dial_section(found) and "loses 0.25 nats" in dial_section(found)
    assert "takes 22 % of the second" in dial_section(found)
    assert "| tokens/s | 500 | 333 | 200 | 111 |" in readme_section(names)
    assert "| 2 | 0.9048 | 90.0% | 0.0500 | 1.5000 | 333 | 1,333 | 0.60 |" in counts_table(found)
    assert '| `k2-repaired` | `{"count":2,"normaliser":"kept","repair":true}` |' in options_table(found)
    assert "| 4 | 1.4000 | 4.055 | 0.5119 |" in card_section("topk-stories", found)
    bare = [structs.replace(option, speed=None) for option in found.options]
    assert "| 2 | 0.9048 | 90.0% | 0.0500 | 1.5000 | – | – |" in counts_table(structs.replace(found, options=bare))


def test_the_picture_has_a_line_per_model_and_a_point_per_count() -> None:
    found = calibration()
    drawn = ElementTree.fromstring(svg({"one": found, "<two>": found}))
    shapes = [element.tag.rpartition("}")[2] for element in drawn.iter()]
    assert shapes.count("polyline") == 2 and shapes.count("circle") == 8
    assert "● <two>" in "".join(drawn.itertext()) and "K = 8: loss 1.3500, 111 tokens/s" in "".join(drawn.itertext())


def test_a_page_without_the_marks_of_a_section_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("nothing here\n")
    with pytest.raises(ValueError, match="no section 'dial'"):
        filled(tmp_path / "page.md", {"dial": "text"})
