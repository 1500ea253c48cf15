"""The figures as a table for people. It computes nothing."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from terminal.bench.figures import FiguresRow
from terminal.sanitize import one_line

SUMMARIES = {
    "ttft_ms": "TTFT, ms",
    "itl_ms": "ITL, ms",
    "e2e_ms": "whole, ms",
    "stream_tokens_per_second": "stream tok/s",
}
WIDTH = 120  # where the output is no terminal


def show(rows: list[FiguresRow], title: str, failures: dict[str, str], notes: list[str]) -> None:
    """Print the table, failures and notes."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    table = Table(title=Text(one_line(title)), box=SIMPLE_HEAD, title_justify="left", header_style="bold")
    for head in ("K", "requests\nfailed", "tok/s", *(f"{name}\nmean\np50 / p90 / p99" for name in SUMMARIES.values())):
        table.add_column(head, justify="right")
    for number, row in enumerate(rows):
        table.add_row(*_cells(row), end_section=number == len(rows) - 2)
    console.print(table)
    for kind, number in rows[-1]["errors"].items():
        first = one_line(failures[kind])
        console.print(Text(f"{number} failed with {one_line(kind)}, the first: {first}", "red"))
    for note in notes:
        console.print(Text(one_line(note), "yellow"))


def _cells(row: FiguresRow) -> list[Text]:
    failed = row["requests"] - row["ok"]
    counts = Text.assemble(f"{row['requests']}\n", (str(failed), "red" if failed else "dim"))
    summaries = [_summary(row[name]) for name in SUMMARIES]
    speed = Text(_short(row["tokens_per_second"]))
    return [Text(_name(row)), counts, speed, *summaries]


def _name(row: FiguresRow) -> str:
    """The requested count, and below it the count that the server reports, where that is another."""
    used = [f"{count:g}" for count in row["used"]]
    if len(used) > 2:  # a mean over the tokens of each request
        used = [f"{used[0]} to {used[-1]}"]
    name = str(row["num_experts"])
    if name == "all" or used in ([], [name]):
        return name
    return f"{name}\nused {', '.join(used)}"


def _summary(figures: FiguresRow) -> Text:
    points = " / ".join(_short(figures[name]) for name in ("p50", "p90", "p99"))
    return Text.assemble(f"{_short(figures['mean'])}\n", (points, "dim"))


def _short(value: float | None) -> str:
    if value is None:
        return "–"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
