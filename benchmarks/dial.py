"""Does the time of a step fall with K as its bytes do?

Measures: one loaded engine decodes greedily at every count in turns, so that a slow spell of the machine hits all of
them alike; the median time of a token over the batch, and its ratio to that at the largest count. Ceiling: the ratio of
the bytes that a step must read, with the experts that the router really touched. No HTTP, no prefix cache.
"""

import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from benchmarks.checkpoints import CHECKPOINTS, write_random
from benchmarks.machine import facts, introduce, use_threads
from benchmarks.systems.ours import OurEngine, OurSession
from benchmarks.systems.system import Rates
from benchmarks.tables import grid
from benchmarks.touched import step_bytes
from benchmarks.workload import OUTPUT, PROMPT


def row(session: OurSession, batch: int, runs: dict[int, list[Rates]]) -> list[dict[str, Any]]:
    """Times and ratios of one batch."""
    times, moved = {}, {}
    for count, each in runs.items():
        times[count] = median(batch / rates.decode for rates in each)
        touched = median(rates.touched or 0 for rates in each)
        moved[count] = step_bytes(session.config, "bf16", touched, count)
    most, rows = max(runs), []
    for count in sorted(runs):
        found = {"batch": batch, "num_experts": count, "step_ms": times[count] * 1e3}
        found["of_time"] = times[count] / times[most]
        found["of_bytes"] = moved[count] / moved[most]
        rows.append(found)
    return rows


def main(
    model: Annotated[str, typer.Option(help="a random checkpoint of benchmarks.checkpoints")] = "olmoe-0.9b-random",
    counts: Annotated[list[int], typer.Option("--count", help="expert counts")] = [1, 2, 4, 8],  # noqa: B006
    batches: Annotated[list[int], typer.Option("--batch")] = [1, 16],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1)] = 7,
    threads: Annotated[int, typer.Option(help="0: all cores")] = 0,
) -> None:
    """Print a table for people and one JSON line for machines."""
    use_threads(threads)
    machine, rows = facts(), []
    introduce(machine)
    with tempfile.TemporaryDirectory() as place, OurEngine().open(written(model, Path(place)), max(counts)) as first:
        first.warm_up()
        sessions = {count: OurSession(first.engine, first.config, count) for count in counts}
        for batch in batches:
            runs: dict[int, list[Rates]] = {count: [] for count in counts}
            for _ in range(repeats):
                for count, session in sessions.items():
                    runs[count].append(session.run([batch])[batch])
            rows += row(first, batch, runs)
    head = ("batch, K", "step, ms", "of the time", "of the bytes", "time / bytes")
    print(f"\n{PROMPT} tokens in, {OUTPUT} out\n")
    print(grid(head, [cells(each) for each in rows]))
    print(json.dumps(machine | {"model": model, "rows": rows}))


def written(model: str, place: Path) -> Path:
    """Write the checkpoint into a folder; returns its path."""
    write_random(CHECKPOINTS[model], place / model)
    return place / model


def cells(each: dict[str, Any]) -> list[str]:
    """The cells of one line of the table."""
    name = f"{each['batch']}, {each['num_experts']}"
    ratio = each["of_time"] / each["of_bytes"]
    figures = (each["step_ms"], each["of_time"], each["of_bytes"], ratio)
    return [name, *(f"{figure:.2f}" for figure in figures)]


if __name__ == "__main__":
    typer.run(main)
