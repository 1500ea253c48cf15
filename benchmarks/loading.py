"""How long does a checkpoint take to load, and how much memory beside the model?

Measures: a random checkpoint of each shape is written, then read twice in turns, each time in a process of its own: its
bytes into new memory, and as a model by `weights.load`. Ceilings: the time of the former, and the model's bytes (in the
dtype it runs in) plus its largest tensor, on top of what the process held before. Files are in the page cache, unless
memory is too small for that.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.checkpoints import LOADED, write_random
from benchmarks.machine import facts, introduce
from benchmarks.tables import grid


def read_bytes(folder: Path) -> float:
    """Seconds of reading every tensor file into new memory."""
    started, kept = time.perf_counter(), []
    for path in sorted(folder.glob("*.safetensors")):
        kept.append(torch.empty(path.stat().st_size, dtype=torch.uint8))
        data, done = memoryview(kept[-1].numpy()), 0  # type: ignore[arg-type]
        with path.open("rb", buffering=0) as file:
            while done < len(data):
                done += file.readinto(data[done:]) or 0
    return time.perf_counter() - started


def load(folder: Path) -> float:
    """Seconds of loading the model."""
    from weights.load import load_model

    started = time.perf_counter()
    load_model(folder)
    return time.perf_counter() - started


def measure(kind: str, folder: Path) -> dict[str, float]:
    """In this process: seconds, and the peak of memory in bytes above what was held before."""
    import weights.load  # noqa: F401 - imports are not part of either

    before = peak()
    seconds = (load if kind == "load" else read_bytes)(folder)
    return {"seconds": seconds, "bytes": float(peak() - before)}


def peak() -> int:
    """The most memory that this process has held, in bytes. (The system's `ru_maxrss` begins with the parent's.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def apart(kind: str, folder: Path) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.loading", "--kind", kind, "--folder", str(folder)]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(run.stdout)
    return found


def compare(name: str, folder: Path, repeats: int) -> dict[str, Any]:
    """Medians of both, and the bound on memory."""
    from weights.config import read_config
    from weights.load import empty_model

    config, _ = read_config(folder)
    parameters = list(empty_model(config, torch.bfloat16).parameters())
    sizes = [p.numel() * p.dtype.itemsize for p in parameters]
    runs = [(apart("read", folder), apart("load", folder)) for _ in range(repeats)]
    read_seconds = [read["seconds"] for read, _ in runs]
    load_seconds = [loaded["seconds"] for _, loaded in runs]
    peak = max(loaded["bytes"] for _, loaded in runs)
    return {
        "model": name,
        "gigabytes": sum(sizes) / 1e9,
        "read_s": statistics.median(read_seconds),
        "load_s": statistics.median(load_seconds),
        "peak_gb": peak / 1e9,
        "bound_gb": (sum(sizes) + max(sizes)) / 1e9,
    }


def cells(row: dict[str, Any]) -> list[str]:
    """One line of the table."""
    ratio = row["load_s"] / row["read_s"]
    times = (row["read_s"], row["load_s"], ratio)
    figures = (row["gigabytes"], *times, row["peak_gb"], row["bound_gb"])
    return [row["model"], *(f"{figure:.2f}" for figure in figures)]


def main(
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    kind: Annotated[str, typer.Option(hidden=True)] = "",
    folder: Annotated[Path, typer.Option(hidden=True)] = Path(),
) -> None:
    """Print a table for people and one JSON line for machines."""
    if kind:
        print(json.dumps(measure(kind, folder)))
        return
    machine, rows = facts(), []
    introduce(machine)
    with tempfile.TemporaryDirectory() as place:
        for name, raw in LOADED.items():
            write_random(raw, Path(place) / name)
            rows.append(compare(name, Path(place) / name, repeats))
    head = ("model", "GB", "read, s", "load, s", "load / read", "peak, GB", "model + largest tensor, GB")
    print(grid(head, [cells(row) for row in rows]))
    print(json.dumps(machine | {"rows": rows}))


if __name__ == "__main__":
    typer.run(main)
