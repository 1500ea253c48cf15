"""How fast are products of rows with packed matrices, by kind of weights and rows? `make bench-products`.

Measures: the op `linear` on matrices that together no cache holds, one after the other, rows encoded again for each:
the best of some rounds, as gigabytes of packed weights and thousands of millions of multiply-adds a second. Kinds:
bfloat16, int8 with one scale per output, and grouped matrices of 4, 6 and 8 bits. Run it on an idle machine.
"""

import time
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.machine import facts, use_threads
from benchmarks.results import Out, finish
from benchmarks.tables import grid
from model.backends.cpu.kernels.library import load
from model.backends.cpu.kernels.pack import Packed, pack
from model.backends.cpu.kernels.params import LinearParams, NormParams
from model.grouped import Grouped, Values, code_bits

WIDTH = 2048  # inputs and outputs of a matrix
COLD_BYTES = 192 << 20
ROUNDS = 5
GROUPED: dict[str, tuple[Values, int, bool]] = {
    "int4, table, groups of 32": ("table6", 32, False),
    "int4, table, groups of 128": ("table6", 128, False),
    "int4, signed, groups of 32": ("signed", 32, False),
    "int4 with minimum, groups of 32": ("unsigned", 32, True),
    "IQ4, groups of 32": ("iq4", 32, False),
    "6 bit, groups of 16": ("signed6", 16, False),
    "8 bit, groups of 32": ("bytes", 32, False),
}


def grouped(values: Values, group: int, minima: bool) -> Grouped:
    """Random codes; scales of 8 bits where our own quantiser's table has them."""
    codes = torch.randint(0, 100, (WIDTH, WIDTH * code_bits(values) // 8))
    codes = codes.to(torch.int8 if values == "bytes" else torch.uint8)
    scales = torch.full((WIDTH, WIDTH // group), 3, dtype=torch.int8 if values == "table6" else torch.float16)
    return Grouped(codes, scales, group, values, scales if minima else None)


def kinds() -> dict[str, Tensor | Grouped]:
    """A matrix of each kind; those that are tensors are named as `pack` names their kind."""
    dense = torch.randn(WIDTH, WIDTH)
    return {"bfloat16": dense, "int8": dense, **{name: grouped(*how) for name, how in GROUPED.items()}}


def packed(name: str, weight: Tensor | Grouped) -> Packed:
    """As the kernels read it."""
    return pack(weight, "int8" if name == "int8" else "bfloat16")


def best_seconds(matrices: list[tuple[object, ...]], x_RK: Tensor) -> float:
    """Of one product."""
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        for matrix in matrices:
            torch.ops.moedial.linear(x_RK, *matrix)
        times.append(time.perf_counter() - started)
    return min(times) / len(matrices)


def measure(name: str, weight: Tensor | Grouped, rows: list[int]) -> dict[int, tuple[float, float]]:
    """Gigabytes and thousands of millions of multiply-adds a second, by rows."""
    size = packed(name, weight).nbytes
    copies = [packed(name, weight) for _ in range(1 + COLD_BYTES // size)]
    matrices = [LinearParams(NormParams(), copy, WIDTH).arguments() for copy in copies]
    found = {}
    for count in rows:
        seconds = best_seconds(matrices, torch.randn(count, WIDTH))
        found[count] = (size / seconds / 1e9, count * WIDTH * WIDTH / seconds / 1e9)
    return found


def main(
    rows: Annotated[list[int], typer.Option()] = [1, 2, 4, 8, 16, 32, 64],  # noqa: B006
    out: Out = None,
) -> None:
    """Print a table for people and one JSON line for machines."""
    use_threads(0)
    if not load().native:
        raise SystemExit(f"packed matrices need the native kernels: {load().reason}")
    values: dict[str, Any] = facts()
    found = {name: measure(name, weight, rows) for name, weight in kinds().items()}
    head = ["weights: GB/s, GMAC/s", *(f"{count} rows" for count in rows)]
    cells = [[name, *(f"{size:.1f}, {macs:.0f}" for size, macs in row.values())] for name, row in found.items()]
    print(grid(head, cells))
    finish(values | {"kernels": load().name, "products": found}, out)


if __name__ == "__main__":
    typer.run(main)
