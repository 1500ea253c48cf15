"""Benchmark figures as markdown tables that also read well in a terminal. `python -m benchmarks.tables FILE` prints the
JSON line of `benchmarks.offline` for the docs. It measures nothing and knows no system by name."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
Key = tuple[int, ...]
LABELS = {"batch": "batch", "num_experts": "K", "context": "context"}
BATCH_AND_COUNT = ("batch", "num_experts")


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Padded columns, the first to the left, the others to the right."""
    columns = zip(head, *rows, strict=True)
    widths = [max(3, *map(len, column)) for column in columns]
    right = ("-" * (width - 1) + ":" for width in widths[1:])
    rule = ["-" * widths[0], *right]
    return "\n".join(_line(cells, widths) for cells in (head, rule, *rows))


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = cells
    padded = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
    line = " | ".join([first.ljust(widths[0]), *padded])
    return f"| {line} |"


def speeds(rows: Sequence[Row], figure: str, key: Sequence[str] = BATCH_AND_COUNT) -> dict[str, dict[Key, float]]:
    """One figure by system, then by the values of these keys."""
    result: dict[str, dict[Key, float]] = {}
    for row in rows:
        cells = result.setdefault(row["system"], {})
        cells[tuple(row[name] for name in key)] = row[figure]
    return result


def rivals(rows: Sequence[Row]) -> dict[str, str]:
    """Each peer and which of ours it is held against: the one on the same kind of file, else the first that stores
    weights alike, else our first. Empty where ours was not measured."""
    ours = [dict(row) for row in rows if row["ours"]]
    by_file: dict[str, str] = {row["file"]: row["system"] for row in ours if row["file"]}
    by_weights: dict[str, str] = {row["weights"]: row["system"] for row in reversed(ours)}
    if not ours:
        return {}
    first = ours[0]["system"]
    peers = (row for row in rows if not row["ours"])
    return {row["system"]: by_file.get(row["file"], by_weights.get(row["weights"], first)) for row in peers}


def table(rows: Sequence[Row], figure: str, key: Sequence[str] = BATCH_AND_COUNT) -> str:
    """One figure (`prefill` or `decode`) of one model: a line for each batch and count (or another key), a column per
    system, and ours over each peer's."""
    by_system, against = speeds(rows, figure, key), rivals(rows)
    keys = sorted({key for cells in by_system.values() for key in cells})
    ratios = (f"{ours} / {peer}" for peer, ours in against.items())
    lines = [_cells(by_system, against, key) for key in keys]
    return grid([", ".join(LABELS[name] for name in key), *by_system, *ratios], lines)


def _cells(by_system: Mapping[str, Mapping[Key, float]], against: Mapping[str, str], key: Key) -> list[str]:
    found = {system: cells.get(key) for system, cells in by_system.items()}
    speeds = ("–" if speed is None else f"{speed:,.0f}" for speed in found.values())
    ratios = (_ratio(found[ours], found[peer]) for peer, ours in against.items())
    return [_key(key), *speeds, *ratios]


def _key(key: Key) -> str:
    return ", ".join(f"{value:,}" for value in key)


def _ratio(ours: float | None, theirs: float | None) -> str:
    return f"{ours / theirs:.2f}" if ours and theirs else "–"


def spread(rows: Sequence[Row], figure: str, key: Sequence[str] = BATCH_AND_COUNT) -> str:
    """The slowest and the fastest run of one figure: a line for each key as in `table`, a column per system."""
    ends: dict[Key, dict[str, str]] = {}
    for row in rows:
        found = [run[figure] for run in row["runs"]]
        ends.setdefault(tuple(row[name] for name in key), {})[row["system"]] = f"{min(found):,.0f}–{max(found):,.0f}"
    systems = list(dict.fromkeys(row["system"] for row in rows))
    lines = [[_key(key), *(ends[key].get(name, "–") for name in systems)] for key in sorted(ends)]
    return grid([", ".join(LABELS[name] for name in key), *systems], lines)


def runs(rows: Sequence[Row]) -> str:
    """How many runs the figures come from."""
    counts = sorted({len(row["runs"]) for row in rows})
    if counts == [1]:
        return "one run"
    return "medians of " + " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1]))) + " runs"


def titled(title: str, rows: Sequence[Row], figure: str, key: Sequence[str] = BATCH_AND_COUNT) -> str:
    """The table of one figure under a title that says of how many runs it is; where there are several, the spread."""
    medians = f"**{title}, tokens/s, {runs(rows)}**\n\n{table(rows, figure, key)}"
    if runs(rows) == "one run":
        return medians
    return f"{medians}\n\n**{title}, tokens/s, slowest–fastest run**\n\n{spread(rows, figure, key)}"


def model_tables(model: str, rows: Sequence[Row]) -> str:
    """The tables of one model, decode before prefill."""
    return "\n\n".join(titled(f"{model}, {figure}", rows, figure) for figure in ("decode", "prefill"))


def page(result: Mapping[str, Any]) -> str:
    """The tables of all models."""
    models = dict.fromkeys(row["model"] for row in result["rows"])
    parts = [model_tables(model, [row for row in result["rows"] if row["model"] == model]) for model in models]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(page(json.loads(Path(sys.argv[1]).read_text())))
