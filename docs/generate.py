"""Writes the tables of the docs that come from code. A test compares; `make docs` regenerates. It measures nothing."""

from pathlib import Path

from docs import families
from server.metrics import metrics_table
from server.settings import settings_table

FOLDER = Path(__file__).parent

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
        metrics_table,
    ),
}


README = FOLDER.parent / "README.md"
BEGIN, END = "<!-- families: written by `make docs` -->\n", "<!-- end of families -->"


def pages() -> dict[Path, str]:
    """Every generated page and its text; of the README, the table of families is."""
    written = {FOLDER / name: head + table().rstrip() + "\n" for name, (head, table) in PAGES.items()}
    before, _, rest = README.read_text().partition(BEGIN)
    return written | {README: before + BEGIN + families.table() + END + rest.partition(END)[2]}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
