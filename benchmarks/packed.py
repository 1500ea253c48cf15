"""How fast does a packed model start, how fast does it run, and what is left of that where memory holds half of it?

Measures, each in a process of its own: seconds from settings to an engine that has computed a token (without the
imports), and by expert count tokens per second of one stream, with the gigabytes that a token had read from the disk
(`/proc/self/io`); of a random checkpoint and of what `moedial pack` makes of it. In the last run a control group limits
the process and all file pages that it brings in to a share of the packed files, none of which are in the page cache at
the start; where no group can be made, it is missing. The ceiling there is the disk: its speed for the same files, read
in large pieces one after the other, is measured first. Random tokens choose their experts at random: text repeats more.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.checkpoints import OLMOE_900M, write_random
from benchmarks.machine import facts, introduce
from benchmarks.results import Out, finish
from benchmarks.tables import grid

GROUPS = {  # parents of control groups of memory, and the file of the limit: version 1, version 2
    Path("/sys/fs/cgroup/memory"): "memory.limit_in_bytes",
    Path("/sys/fs/cgroup"): "memory.max",
}
COUNTS = (8, 4, 2, 1)
WARM_UP = 8  # tokens of each count that are not timed
PIECE = 4 << 20


def measure(folder: Path, tokens: int, group: str) -> dict[str, Any]:
    """In this process, which joins the control group first: seconds to start, its own memory, and a row by count."""
    from engine.build import build_engine
    from engine.types import EngineSettings

    if group:
        Path(group).write_text(str(os.getpid()))
    started = time.perf_counter()
    settings = EngineSettings(str(folder), kv_cache_bytes=64 << 20, max_running=1, max_model_len=512, step_ms=0)
    engine, info = build_engine(settings)
    start_s = time.perf_counter() - started
    rows = [at_count(engine, info.experts.budget(count), count, tokens) for count in COUNTS]
    return {"start_s": start_s, "process_gb": own_memory() / 1e9, "counts": rows}


def at_count(engine: Any, budget: Any, count: int, tokens: int) -> dict[str, float]:
    """Tokens per second of one stream at one count, and what each had read from the disk."""
    from engine.types import Request, Sampling

    wanted = Sampling(max_tokens=1 + WARM_UP + tokens, seed=count, temperature=1.0)
    engine.add(Request(f"k{count}", tuple(range(3, 35)), budget, wanted))
    for _ in range(1 + WARM_UP):  # the first is the prompt
        engine.step()
    read, started, done = bytes_read(), time.perf_counter(), 0
    while engine.has_work:
        done += len(engine.step().events)
    took = time.perf_counter() - started
    return {"num_experts": count, "tokens_per_s": done / took, "read_gb": (bytes_read() - read) / done / 1e9}


def bytes_read() -> int:
    """What this process has had read from disks so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def own_memory() -> int:
    """Bytes of this process that are no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def apart(folder: Path, tokens: int, group: str = "") -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.packed", "--folder", str(folder), "--tokens", str(tokens)]
    run = subprocess.run([*command, "--group", group], check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(run.stdout)
    return found


@contextmanager
def limited(most: int) -> Iterator[str]:
    """A control group whose processes hold at most so many bytes, page cache included; "" where none can be made."""
    name = f"moedial-bench-{os.getpid()}"
    for parent, limit in GROUPS.items():
        group = parent / name
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if (group / limit).exists():  # else a plain folder
                (group / limit).write_text(str(most))
                yield str(group / "cgroup.procs")
                return
        finally:
            group.rmdir()
    yield ""


def forget(folder: Path) -> None:
    """Take the files out of the page cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_speed(folder: Path) -> float:
    """GB/s of reading the files one after the other, none of them in the page cache; at most one gigabyte."""
    forget(folder)
    buffer, done, started = bytearray(PIECE), 0, time.perf_counter()
    for path in sorted(folder.iterdir()):
        with path.open("rb", buffering=0) as file:
            while done < 1e9 and (got := file.readinto(buffer)):
                done += got
    return done / (time.perf_counter() - started) / 1e9


def rows_of(place: Path, share: float, tokens: int, layers: int) -> list[dict[str, Any]]:
    """One row for the checkpoint, two for it packed, and one for the packed one where memory holds a share of it."""
    from engine.packing import pack_model

    write_random(OLMOE_900M | {"num_hidden_layers": layers}, place / "checkpoint")
    started = time.perf_counter()
    pack_model(str(place / "checkpoint"), place / "packed")
    pack_s = time.perf_counter() - started
    size = sum(file.stat().st_size for file in (place / "packed").iterdir())
    rows: list[dict[str, Any]] = [{"model": "checkpoint"} | apart(place / "checkpoint", tokens)]
    forget(place / "packed")
    cold = apart(place / "packed", tokens)
    rows.append({"model": "packed, from the disk", "pack_s": pack_s, "gigabytes": size / 1e9} | cold)
    rows.append({"model": "packed, in the page cache"} | apart(place / "packed", tokens))
    speed = disk_speed(place / "packed")
    forget(place / "packed")
    if size * share < 1.2e9 * rows[-1]["process_gb"]:
        print(f"no limited run: {size * share / 1e9:.2f} GB hardly hold the process, {rows[-1]['process_gb']:.2f} GB")
        return rows
    with limited(int(size * share)) as group:
        if group:
            limit = {"model": f"packed, memory for {share:.0%} of it", "limit_gb": size * share / 1e9}
            rows.append(limit | {"disk_gb_s": speed} | apart(place / "packed", tokens, group))
    return rows


def report(rows: Sequence[dict[str, Any]]) -> str:
    """How fast each starts and runs by count; then what the limited one reads, and what the disk would allow."""
    head = ["model", "start, s", "process, GB", *(f"K = {count}, tokens/s" for count in COUNTS)]
    lines = []
    for row in rows:
        speeds = (f"{each['tokens_per_s']:.1f}" for each in row["counts"])
        lines.append([row["model"], f"{row['start_s']:.2f}", f"{row['process_gb']:.2f}", *speeds])
    parts = [grid(head, lines)]
    for row in (row for row in rows if "limit_gb" in row):
        cells = [count_cells(each, row["disk_gb_s"]) for each in row["counts"]]
        size = next(each["gigabytes"] for each in rows if "gigabytes" in each)
        parts.append(
            f"{size:.2f} GB packed, a limit of {row['limit_gb']:.2f} GB, of which the process itself takes "
            f"{row['process_gb']:.2f}; the disk reads {row['disk_gb_s']:.2f} GB/s\n\n"
            + grid(["K", "tokens/s", "read, MB a token", "disk allows, tokens/s", "reached"], cells)
        )
    return "\n\n".join(parts)


def count_cells(each: dict[str, float], disk: float) -> list[str]:
    """One line of the limited model's table."""
    ceiling = disk / each["read_gb"] if each["read_gb"] else float("inf")
    reached = each["tokens_per_s"] / ceiling
    figures = (f"{each['tokens_per_s']:.1f}", f"{each['read_gb'] * 1e3:.1f}", f"{ceiling:.1f}", f"{reached:.0%}")
    return [f"{each['num_experts']}", *figures]


def main(
    share: Annotated[float, typer.Option(min=0.05, max=1.0, help="Of the files that memory may hold")] = 0.5,
    tokens: Annotated[int, typer.Option(min=2, max=400)] = 48,
    layers: Annotated[int, typer.Option(min=1, help="Of the 0.9 B OLMoE shape, which has 8")] = 16,
    folder: Annotated[Path, typer.Option(hidden=True)] = Path(),
    group: Annotated[str, typer.Option(hidden=True)] = "",
    out: Out = None,
) -> None:
    """Print tables for people and one JSON line for machines."""
    if folder != Path():
        print(json.dumps(measure(folder, tokens, group)))
        return
    machine = facts()
    introduce(machine)
    with tempfile.TemporaryDirectory() as place:
        rows = rows_of(Path(place), share, tokens, layers)
    print(f"\n{report(rows)}\n")
    finish(machine | {"layers": layers, "rows": rows}, out)


if __name__ == "__main__":
    typer.run(main)
