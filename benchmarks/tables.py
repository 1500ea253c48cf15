"""The JSON line of `benchmarks.offline` as markdown tables for the docs: `python -m benchmarks.tables FILE`."""

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


def table(rows: Iterable[Row], figure: str) -> str:
    """One figure (`prefill` or `decode`) of one model: a line per batch and system, a column per count."""
    rows = list(rows)
    counts = sorted({row["num_experts"] for row in rows})
    lines = ["| batch | system | " + " | ".join(f"K = {k}" for k in counts) + " |", "|---" * (2 + len(counts)) + "|"]
    for batch, system in dict.fromkeys((row["batch"], row["system"]) for row in sorted(rows, key=lambda r: r["batch"])):
        speeds = {row["num_experts"]: row[figure] for row in rows if (row["batch"], row["system"]) == (batch, system)}
        cells = (f"{speeds[k]:,.0f}" if k in speeds else "–" for k in counts)
        lines.append(f"| {batch} | {system} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(result: Mapping[str, Any]) -> str:
    """All models, decode before prefill."""
    parts = []
    for model in dict.fromkeys(row["model"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["model"] == model]
        for figure in ("decode", "prefill"):
            parts.append(f"**{model}, {figure}, tokens/s**\n\n{table(rows, figure)}")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(page(json.loads(Path(sys.argv[1]).read_text())))
