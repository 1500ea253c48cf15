"""Writes the tables of the docs that come from code and from the bundled models' calibrations and cards, and the board.

A test compares; `make docs` regenerates. It measures nothing.
"""

from pathlib import Path

from deploy.grafana import board
from docs import calibrated, curve, demos, families
from server.metrics import metrics_table
from server.settings import settings_table
from server.vllm_metrics import vllm_table
from weights.folder import BUNDLED, DEFAULT

FOLDER = Path(__file__).parent

VLLM_NAMES = """\
## vLLM's names

With `--metrics-compat vllm` tools that were made for vLLM find their series as well: autoscalers, gateways and boards.
Values are the same, summed over expert counts. Names of older versions that are still read come second.

"""
PAGES = {
    "settings.md": (
        "# Settings\n\nEvery option of `moedial serve`, by flag and by environment variable. "
        "A flag wins over a variable, a variable over the default. "
        "Other variables that begin with `MOEDIAL_` are refused, except those of "
        "the [native kernels](kernels.md), of the [command-line clients](terminal.md), "
        "and those that Kubernetes and Docker set for a service of this name.\n\n",
        settings_table,
    ),
    "metrics.md": (
        "# Metrics\n\nWhat `GET /metrics` serves. Names, buckets and meanings follow vLLM where it has the series.\n\n",
        lambda: f"{metrics_table()}\n{VLLM_NAMES}{vllm_table()}",
    ),
}

README = FOLDER.parent / "README.md"
EXPERTS = FOLDER / "experts.md"
MIXTURES = FOLDER / "mixtures.md"


def pages() -> dict[Path, str]:
    """Every generated page and its text; of hand-written ones, the sections between their marks are generated."""
    written = {FOLDER / name: head + table().rstrip() + "\n" for name, (head, table) in PAGES.items()}
    found = calibrated.bundled_calibrations()
    drawn = {FOLDER / calibrated.PICTURE: curve.svg(found)} if found else {}
    return (
        written
        | drawn
        | {board.FILE: board.text()}
        | {path: filled(path, sections) for path, sections in _sections(found).items()}
    )


def _sections(found: calibrated.Calibrations) -> dict[Path, dict[str, str]]:
    """The generated sections of hand-written pages, by name. Without a calibration its sections stay as they are."""
    sections: dict[Path, dict[str, str]] = {README: {"families": families.table()}}
    if shown := demos.section():
        sections[MIXTURES] = {"demo models": shown}
    if found:
        sections[README]["calibrations"] = calibrated.readme_section(found)
        sections[EXPERTS] = {}
    if DEFAULT in found:
        sections[README]["dial"] = calibrated.dial_section(found[DEFAULT])
    for name, calibration in found.items():
        sections[BUNDLED / name / "README.md"] = {"calibration": calibrated.card_section(name, calibration)}
        sections[EXPERTS][f"counts of {name}"] = calibrated.counts_table(calibration)
        sections[EXPERTS][f"options of {name}"] = calibrated.options_table(calibration)
    return sections


def filled(path: Path, sections: dict[str, str]) -> str:
    """A page with its generated sections replaced.

    Raises:
        ValueError: the page has no marks of a section.
    """
    text = path.read_text()
    for name, section in sections.items():
        begin, end = f"<!-- {name}: written by `make docs` -->\n", f"<!-- end of {name} -->"
        before, mark, rest = text.partition(begin)
        if not mark or end not in rest:
            raise ValueError(f"{path} has no section {name!r}")
        text = before + begin + section + end + rest.partition(end)[2]
    return text


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
