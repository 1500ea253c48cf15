"""What does one batch of mixed expert counts give over the ways there were before? `make bench-mixed`.

Measures: 16 requests arrive at once (128 random tokens in, 64 out, greedy), half of them content with K = 2, half
wanting K = 8. (mixed) one engine, each request at its own count, in one batch; (all at 8) the same engine, everybody
at the larger count, as a server with one count per load must; (two engines) a process per class, sharing the cores,
with one thread each and with all threads each. For comparison (all at 2), the floor. Throughput is new tokens over
the time until the last one; latencies are means over a class: time to first token, and time per token after it. The
ceiling of `mixed` over `all at 8` is what the bytes and products of the smaller count save; of `two engines` over
`mixed`, nothing. Engines take at most 512 tokens a step; no HTTP, no prefix cache; medians over `--repeats`, arms
in turn.
"""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import mean, median
from time import monotonic
from typing import Annotated

import typer

from benchmarks.arrivals import Loaded, Times, Worker, side_by_side
from benchmarks.checkpoints import CHECKPOINTS, write_random
from benchmarks.machine import facts, introduce, use_threads
from benchmarks.results import Out, finish
from benchmarks.tables import grid
from benchmarks.workload import OUTPUT
from model.backends.cpu.kernels.library import load

Figures = dict[str, float]
Arm = Callable[[], Times]


def classes(total: int, large: int, small: int) -> dict[int, int]:
    """Each request's own count; the classes take turns in the queue."""
    return {number: large if number % 2 == 0 else small for number in range(total)}


def figures(times: Times, wishes: dict[int, int]) -> Figures:
    """Throughput in tokens per second, and per class the two latencies in milliseconds."""
    if any(len(moments) != OUTPUT for moments in times.values()):
        raise RuntimeError("a request did not get all its tokens")
    seconds = max(moments[-1] for moments in times.values())
    result = {"tok/s": sum(map(len, times.values())) / seconds}
    for count in sorted(set(wishes.values()), reverse=True):
        mine = [times[number] for number, wish in wishes.items() if wish == count]
        gaps = [(moments[-1] - moments[0]) / (OUTPUT - 1) for moments in mine]
        result[f"first token, K={count} class, ms"] = 1e3 * mean(moments[0] for moments in mine)
        result[f"per token, K={count} class, ms"] = 1e3 * mean(gaps)
    return result


def arms(loaded: Loaded, workers: list[Worker], wishes: dict[int, int], threads: int) -> dict[str, Arm]:
    """Every way to serve the same wishes."""
    total = len(wishes)
    large, small = max(wishes.values()), min(wishes.values())

    def share(wanted: int) -> dict[int, int]:
        return {number: count for number, count in wishes.items() if count == wanted}

    shares = [share(large), share(small)]

    def alone(counts: dict[int, int]) -> Arm:
        return lambda: loaded.serve(counts, total, monotonic())

    def apart(each: int) -> Arm:
        return lambda: side_by_side(workers, shares, total, each)

    found = {"mixed": alone(wishes)}
    for count in (large, small):
        found[f"all at {count}"] = alone(dict.fromkeys(wishes, count))
    for each in sorted({1, threads}):
        found[f"two engines, {each} thread{'s' * (each > 1)} each"] = apart(each)
    return found


def same_kernels(workers: list[Worker]) -> str:
    """What every engine runs on; comparing different ones would say nothing."""
    (kernels,) = {load().name, *(worker.kernels for worker in workers)}
    print(f"kernels: {kernels}", flush=True)
    return kernels


def measure(all_arms: dict[str, Arm], wishes: dict[int, int], repeats: int) -> dict[str, Figures]:
    """Medians of each figure; arms in turn, after one round that is not counted."""
    rounds: dict[str, list[Figures]] = {name: [] for name in all_arms}
    for _ in range(repeats + 1):
        for name, arm in all_arms.items():
            rounds[name].append(figures(arm(), wishes))
    return {name: _medians(rows[1:]) for name, rows in rounds.items()}


def _medians(rows: list[Figures]) -> Figures:
    return {key: median(row[key] for row in rows) for key in rows[0]}


def verdict(results: dict[str, Figures]) -> dict[str, float | str]:
    """The mixed batch against everybody at the larger count, and against the better pair of engines."""
    speed = {name: row["tok/s"] for name, row in results.items()}
    pair = max((name for name in speed if name.startswith("two engines")), key=speed.__getitem__)
    one = next(name for name in speed if name.startswith("all at"))  # the larger count comes first
    of_one = speed["mixed"] / speed[one]
    of_pair = speed["mixed"] / speed[pair]
    return {f"mixed / {one}": of_one, "better pair": pair, "mixed / better pair": of_pair}


def table(results: dict[str, Figures]) -> str:
    """A line per arm, a column per figure."""
    columns = list(results["mixed"])
    lines = []
    for name, row in results.items():
        lines.append([name, *(f"{row[key]:,.1f}" for key in columns)])
    return grid(["", *columns], lines)


def main(
    model: Annotated[str, typer.Option(help=f"a folder, or one of {', '.join(CHECKPOINTS)}")] = "olmoe-0.9b-random",
    batch: Annotated[int, typer.Option(help="requests, half of each class")] = 16,
    large: int = 8,
    small: int = 2,
    repeats: int = 3,
    threads: int = 0,
    out: Out = None,
) -> None:
    """Print a table for people and one JSON line for machines."""
    use_threads(threads)
    values = facts()
    introduce(values)
    wishes = classes(batch, large, small)
    with ExitStack() as stack:
        folder = Path(model)
        if model in CHECKPOINTS:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / model
            write_random(CHECKPOINTS[model], folder)
        workers = [Worker(folder) for _ in range(2)]
        for worker in workers:
            stack.callback(worker.close)
        values["kernels"] = same_kernels(workers)
        results = measure(arms(Loaded.load(folder), workers, wishes, values["threads"]), wishes, repeats)
    print(f"\n{model}: {batch} requests, half of them at K = {large}, half at K = {small}\n")
    print(table(results))
    found = verdict(results)
    for name, value in found.items():
        print(f"{name}: {value if isinstance(value, str) else f'{value:.2f}'}")
    finish(values | {"model": model, "batch": batch, "arms": results} | found, out)


if __name__ == "__main__":
    typer.run(main)
