"""What do threads and memory nodes cost the kernels? `make bench-threads`.

Two tables, each of medians, and of the processor time that all threads took for a call, which says what waiting costs
and is little changed by other programs. Empty tasks on the pool alone (`pool.cpp`), by threads, nodes and tasks: in a
job of many tasks it is the claims. Ops on 1 to 64 threads in 1 to 4 groups, bf16: a linear layer and the experts of a
mixture, for one token and for 64. Threads beyond the cores that there are show what waiting and contention cost, not
what more cores would gain; groups on a machine with one memory node show what the division costs.
"""

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer

from benchmarks.machine import facts, introduce
from benchmarks.tables import grid
from model.backends.cpu.kernels import threads
from model.backends.cpu.kernels.build import COMMON, SOURCES
from model.backends.cpu.kernels.library import load
from model.backends.cpu.kernels.pack import pack
from model.backends.cpu.kernels.params import ExpertsParams, LinearParams, NormParams

THREADS, NODES, TASKS, ROWS = (1, 2, 4, 8, 16, 32, 64), (1, 2, 4), (64, 4096), (1, 64)
WIDTH, UNITS, EXPERTS, CHOSEN = 1024, 512, 64, 8
COPIES = 6  # of a linear layer's weights, 6 MB each: they take turns, so that none is in the cache

Call = Callable[[int], object]
ops = torch.ops.moedial


@dataclass(frozen=True, slots=True)
class Cell:
    """Microseconds of one thing, on so many threads in so many groups."""

    what: str
    threads: int
    nodes: int
    middle: float
    processor: float  # of all threads


def empty_tasks(jobs: int) -> list[Cell]:
    """Jobs of empty tasks, for every number of threads, nodes and tasks."""
    cells = []
    with tempfile.TemporaryDirectory() as folder:
        program, source = Path(folder) / "pool", Path(__file__).with_name("pool.cpp")
        command = ["g++", *COMMON, f"-I{SOURCES}", str(source), str(SOURCES / "pool.cpp"), "-o", str(program)]
        subprocess.run(command, check=True)
        for tasks in TASKS:
            for count, nodes in groups():
                given = [str(program), *map(str, (count, nodes, tasks, jobs))]
                said = subprocess.run(given, check=True, capture_output=True, text=True).stdout
                middle, processor = (float(word) / 1e3 for word in said.split())
                cells.append(Cell(f"{tasks} tasks", count, nodes, middle, processor))
    return cells


def groups() -> list[tuple[int, int]]:
    """Every number of threads with every number of nodes that it can serve."""
    return [(count, nodes) for count in THREADS for nodes in NODES if nodes <= count]


def made_ops() -> dict[str, Call]:
    """Ops by name; a call gets its number, and takes another copy of the weights than the last."""
    torch.manual_seed(0)
    layers = [pack(torch.randn(3 * WIDTH, WIDTH).bfloat16(), "bfloat16") for _ in range(COPIES)]
    linear = [LinearParams(NormParams(), layer, layer.n).arguments() for layer in layers]
    up = pack(torch.randn(EXPERTS, 2 * UNITS, WIDTH).bfloat16(), "bfloat16")
    down = pack(torch.randn(EXPERTS, WIDTH, UNITS).bfloat16(), "bfloat16")
    experts = ExpertsParams(up, down, UNITS, True, "silu").arguments()
    made: dict[str, Call] = {}
    for rows in ROWS:
        x_TD = torch.randn(rows, WIDTH)
        choices = [choice(rows) for _ in range(COPIES)]
        made[f"linear, {rows}"] = in_turns(ops.linear, [(x_TD, *given) for given in linear])
        made[f"experts, {rows}"] = in_turns(ops.experts, [(x_TD, *chosen, *experts) for chosen in choices])
    return made


def in_turns(op: Callable[..., object], inputs: Sequence[tuple[object, ...]]) -> Call:
    """Calls the op with one of several inputs after the other."""
    return lambda turn: op(*inputs[turn % len(inputs)])


def choice(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Routed pairs of random experts: token, weight, and where each expert's pairs end."""
    expert_R = torch.cat([torch.randperm(EXPERTS)[:CHOSEN] for _ in range(rows)])
    order_R = expert_R.argsort(stable=True)
    ends_E = torch.bincount(expert_R, minlength=EXPERTS).cumsum(0)
    return (order_R // CHOSEN).int(), torch.full((len(order_R),), 1 / CHOSEN), ends_E


def timed_ops(calls: int) -> list[Cell]:
    """Every op on every number of threads and nodes, one after the other."""
    made, cells = made_ops(), []
    for count, nodes in groups():
        ops.set_nodes([1] * nodes, [])
        threads.use(count)
        for name, call in made.items():
            used = time.process_time()
            middle = median(timed(call, turn) for turn in range(calls))
            cells.append(Cell(name, count, nodes, middle, 1e6 * (time.process_time() - used) / calls))
    return cells


def timed(call: Call, turn: int) -> float:
    """Microseconds of one call."""
    started = time.perf_counter()
    call(turn)
    return 1e6 * (time.perf_counter() - started)


def table(cells: Sequence[Cell]) -> str:
    """A line for each number of threads and nodes; a column for each thing: median (processor time)."""
    found = {(cell.what, cell.threads, cell.nodes): f"{cell.middle:,.1f} ({cell.processor:,.1f})" for cell in cells}
    names = list(dict.fromkeys(cell.what for cell in cells))
    lines = [[f"{count}, {nodes}", *(found[name, count, nodes] for name in names)] for count, nodes in groups()]
    return grid(["threads, nodes", *(f"{name}, µs" for name in names)], lines)


def main(
    jobs: Annotated[int, typer.Option(help="of empty tasks", min=10)] = 2000,
    calls: Annotated[int, typer.Option(help="of each op", min=10)] = 100,
) -> None:
    """Measure, and print two tables and a line of JSON."""
    if not load().native:
        raise SystemExit(f"no native kernels: {load().reason}")
    about = facts()
    introduce(about)
    torch.set_num_threads(1)
    pool, products = empty_tasks(jobs), timed_ops(calls)
    print(f"\n{table(pool)}\n\n{table(products)}\n")
    print(json.dumps(about | {"pool": [asdict(cell) for cell in pool], "ops": [asdict(cell) for cell in products]}))


if __name__ == "__main__":
    typer.run(main)
