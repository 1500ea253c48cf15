"""What does a count of the bundled models cost, in quality and in time?

Measures: decoding speed of one stream at every served count, the counts in turns so that a slow spell of the machine
hits all of them; the held-out losses are those of the models' cards. Ceiling: the time at the largest count, and the
bytes that are left at a smaller one. `--plot FILE` draws loss against count and against speed: the README's picture.
"""

import json
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from benchmarks.machine import facts, introduce, use_threads
from benchmarks.systems.ours import OurEngine, OurSession
from benchmarks.tables import grid
from weights.folder import bundled_models, read_json, resolve_model

COUNTS = (1, 2, 4, 8)


def speeds(folder: Path, repeats: int) -> dict[int, float]:
    """Tokens per second of one stream at each count; medians."""
    found: dict[int, list[float]] = {count: [] for count in COUNTS}
    with OurEngine().open(folder, max(COUNTS)) as first:
        sessions = {count: OurSession(first.engine, first.config, count) for count in COUNTS}
        for _ in range(repeats):
            for count, session in sessions.items():
                found[count].append(session.run([1])[1].decode)
    return {count: median(each) for count, each in found.items()}


def rows_of(name: str, repeats: int) -> list[dict[str, Any]]:
    """Loss, speed and time against the largest count of one bundled model."""
    folder = resolve_model(name)
    losses = {row["num_experts"]: row["loss"] for row in read_json(folder / "card.json")["quality"]}
    speed = speeds(folder, repeats)
    return [
        {
            "model": name,
            "num_experts": count,
            "loss": losses[count],
            "tokens_per_second": round(speed[count], 1),
            "of_time": round(speed[max(COUNTS)] / speed[count], 3),
        }
        for count in COUNTS
    ]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss against count, and loss against speed."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        losses = [row["loss"] for row in mine]
        left.plot([row["num_experts"] for row in mine], losses, marker="o", label=model)
        right.plot([row["tokens_per_second"] for row in mine], losses, marker="o", label=model)
        for row in mine:
            place = (row["tokens_per_second"], row["loss"])
            right.annotate(f"K={row['num_experts']}", place, xytext=(4, 4), textcoords="offset points", fontsize=7)
    left.set_xscale("log", base=2)
    left.set_xticks(COUNTS, labels=[str(count) for count in COUNTS])
    left.set(xlabel="experts per token (K), chosen per request", ylabel="held-out loss (nats)")
    right.set(xlabel="tokens/s, one stream")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    threads: Annotated[int, typer.Option(help="0: all cores")] = 0,
    picture: Annotated[Path | None, typer.Option("--plot", help="where the picture goes")] = None,
) -> None:
    """Print a table for people and one JSON line for machines."""
    use_threads(threads)
    machine = facts()
    introduce(machine)
    rows = [row for name in bundled_models() for row in rows_of(name, repeats)]
    head = ("model, K", "loss", "tokens/s", "of the time")
    cells = [
        [f"{row['model']}, {row['num_experts']}", *(str(row[key]) for key in ("loss", "tokens_per_second", "of_time"))]
        for row in rows
    ]
    print(grid(head, cells))
    if picture is not None:
        plot(rows, picture)
    print(json.dumps(machine | {"rows": rows}))


if __name__ == "__main__":
    typer.run(main)
