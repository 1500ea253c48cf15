"""How fast is one mixture layer, and how far from what the machine allows? `make bench-layer`.

Measures: a whole layer with its router, bf16, by tokens and expert count K: shaped like OLMoE's and like Mixtral's
(ours in torch, ours native, transformers' block), and an ∞-MoE layer (also against the dense layer of its width).
Medians of single calls, ways in turn, after a warm-up. Several copies of the weights and different inputs take turns,
so that no weights are still in the cache. Ceilings, measured in the same run: the time to move the bytes that must
move (distinct experts, router, tokens in and out) at the memory bandwidth, or to do the operations at the peak of
large bf16 products, whichever is longer. Run it on an idle machine.
"""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Annotated, Any

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as the server sets it for its engine

import torch
import typer

from benchmarks.layers.shapes import SHAPES, Call, Shape, Work, calls, parameters, work
from benchmarks.layers.systems import Layer, build, torch_mixture
from benchmarks.machine import facts, introduce, matrix_peak, use_threads
from benchmarks.results import Out, finish
from benchmarks.tables import grid

WARM_UP, LEAST, MOST = 2, 5, 300  # rounds


@dataclass(frozen=True, slots=True)
class Cell:
    """One shape, number of tokens and count: what must be done, the ceiling, and the seconds of every way."""

    shape: str
    tokens: int
    num_experts: int
    work: Work
    ceiling: float
    seconds: dict[str, float]


def timed(ways: dict[str, list[Layer]], inputs: Sequence[Call], seconds: float) -> dict[str, float]:
    """Median seconds of a call, ways in turn for about `seconds` each. A way meets each input and copy long after
    another way did, so that no run finds weights in the cache."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    ends = time.perf_counter() + seconds * len(ways)
    for number in range(WARM_UP + MOST):
        if number >= WARM_UP + LEAST and time.perf_counter() > ends:
            break
        for place, (way, copies) in enumerate(ways.items()):
            call = inputs[(number + 7 * place) % len(inputs)]
            started = time.perf_counter()
            copies[(number + place) % len(copies)](call.x_TD, call.use)
            times[way].append(time.perf_counter() - started)
    return {way: median(taken[WARM_UP:]) for way, taken in times.items()}


@torch.inference_mode()
def bench(
    shape: Shape, tokens: Sequence[int], counts: Sequence[int], seconds: float, read: float, peak: float
) -> Iterator[Cell]:
    """All cells of one shape. `read` in GB/s, `peak` in GFLOP/s."""
    copies = [parameters(shape, seed) for seed in range(shape.copies)]
    ways, reference = build(shape, copies), torch_mixture(shape, copies[0])
    for rows in tokens:
        for count in counts:
            inputs = calls(shape, rows, count)
            least = work(shape, reference, inputs)
            ceiling = max(least.bytes / read, least.flops / peak) / 1e9
            yield Cell(shape.name, rows, count, least, ceiling, timed(ways, inputs, seconds))


def times_table(cells: Sequence[Cell]) -> str:
    """Microseconds of every way beside the ceiling, and what our best takes of the best other."""
    ways = list(cells[0].seconds)
    head = ["tokens, K", "experts", "MB", "GFLOP", "ceiling, µs", *(f"{way}, µs" for way in ways), "other / ours"]
    return grid(head, [_times(cell) for cell in cells])


def _times(cell: Cell) -> list[str]:
    ours = [t for way, t in cell.seconds.items() if way.startswith("ours")]
    others = [t for way, t in cell.seconds.items() if not way.startswith("ours")]
    ratio = f"{min(others) / min(ours):.2f}" if others else "–"
    times = (f"{1e6 * seconds:,.0f}" for seconds in cell.seconds.values())
    return [f"{cell.tokens}, {cell.num_experts}", *_least(cell), *times, ratio]


def _least(cell: Cell) -> list[str]:
    """What any way has to move and to compute, and the time of it at the machine's limits."""
    work, ceiling = cell.work, 1e6 * cell.ceiling
    megabytes, gflop = work.bytes / 1e6, work.flops / 1e9
    return [f"{work.distinct:.1f}", f"{megabytes:.1f}", f"{gflop:.3f}", f"{ceiling:,.0f}"]


def rates_table(cells: Sequence[Cell]) -> str:
    """What every way achieves: GB/s of the bytes that must move, GFLOP/s, and the share of the ceiling."""
    rows = [_rates(cell) for cell in cells]
    return grid(["tokens, K", *(f"{way}: GB/s, GFLOP/s" for way in cells[0].seconds)], rows)


def _rates(cell: Cell) -> list[str]:
    rates = (_rate(cell, seconds) for seconds in cell.seconds.values())
    return [f"{cell.tokens}, {cell.num_experts}", *rates]


def _rate(cell: Cell, seconds: float) -> str:
    gigabytes = cell.work.bytes / seconds / 1e9
    gflop = cell.work.flops / seconds / 1e9
    return f"{gigabytes:.1f}, {gflop:,.0f} ({cell.ceiling / seconds:.0%})"


def json_row(cell: Cell) -> dict[str, Any]:
    """A cell with numbers short enough to read."""
    micro = {way: round(1e6 * seconds, 1) for way, seconds in cell.seconds.items()}
    return asdict(cell) | {"ceiling": round(1e6 * cell.ceiling, 1), "seconds": micro, "unit": "µs"}


def main(
    shape: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(shape.name for shape in SHAPES)}")] = None,
    tokens: Annotated[list[int], typer.Option()] = [1, 4, 16, 64, 256, 1024],  # noqa: B006
    count: Annotated[list[int], typer.Option(help="expert counts")] = [1, 2, 4, 8],  # noqa: B006
    seconds: Annotated[float, typer.Option(help="about how long to measure each way in each cell")] = 0.5,
    threads: int = 0,
    out: Out = None,
) -> None:
    """Print tables for people and one JSON line for machines."""
    use_threads(threads)
    values = facts() | {"matrix_gflop_s": round(matrix_peak(), 1)}
    introduce(values)
    rows = []
    for one in (one for one in SHAPES if not shape or one.name in shape):
        cells = list(bench(one, tokens, count, seconds, values["memory_gb_s"], values["matrix_gflop_s"]))
        print(f"\n**{one.name}**: {one.kind}, width {one.width}, {one.copies} copies\n")
        print(times_table(cells))
        if "ours, native" not in cells[0].seconds:
            print("\nThere is no native kernel for this layer.")
        print(f"\n{rates_table(cells)}", flush=True)
        rows += [json_row(cell) for cell in cells]
    finish(values | {"rows": rows}, out)


if __name__ == "__main__":
    typer.run(main)
