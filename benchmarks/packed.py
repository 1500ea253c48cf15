"""How fast does a packed model start, how fast does it run, and what is left of that where memory holds half of it?

Measures, each in a process of its own: seconds from settings to an engine that has computed a token (without the
imports), and tokens per second of one stream at the trained count; of a random checkpoint and of what `moedial pack`
makes of it. A share below 1 limits the memory of the packed model's process to that share of its files by a control
group, with none of the files in the page cache at the start; where no group can be made, that row is missing.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.checkpoints import OLMOE_900M, write_random
from benchmarks.machine import facts, introduce
from benchmarks.tables import grid

GROUPS = {  # parents of control groups of memory, and the file of the limit: version 1, version 2
    Path("/sys/fs/cgroup/memory"): "memory.limit_in_bytes",
    Path("/sys/fs/cgroup"): "memory.max",
}
HELD = 400 << 20  # bytes of the process itself: Python, torch, the KV cache


def measure(folder: Path, tokens: int, group: str) -> dict[str, float]:
    """In this process, which joins the control group first: seconds to start, and tokens per second."""
    from engine.build import build_engine
    from engine.types import EngineSettings, Request, Sampling
    from model.budget import ExpertBudget

    if group:
        Path(group).write_text(str(os.getpid()))
    started = time.perf_counter()
    settings = EngineSettings(str(folder), kv_cache_bytes=64 << 20, max_running=1, max_model_len=512, step_ms=0)
    engine, info = build_engine(settings)
    start_s = time.perf_counter() - started
    budget = ExpertBudget((info.experts.trained,) * info.experts.layers)
    engine.add(Request("a", tuple(range(32)), budget, Sampling(max_tokens=tokens, seed=0, temperature=1.0)))
    engine.step()  # the prompt
    started, done = time.perf_counter(), 0
    while engine.has_work:
        done += len(engine.step().events)
    return {"start_s": start_s, "tokens_per_s": done / (time.perf_counter() - started)}


def apart(folder: Path, tokens: int, group: str = "") -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.packed", "--folder", str(folder), "--tokens", str(tokens)]
    run = subprocess.run([*command, "--group", group], check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(run.stdout)
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


def rows_of(place: Path, share: float, tokens: int) -> list[dict[str, Any]]:
    """One row for the checkpoint, one for it packed, and one for the packed one where memory holds a share of it."""
    from engine.packing import pack_model

    write_random(OLMOE_900M, place / "checkpoint")
    started = time.perf_counter()
    pack_model(str(place / "checkpoint"), place / "packed")
    pack_s = time.perf_counter() - started
    size = sum(file.stat().st_size for file in (place / "packed").iterdir())
    rows: list[dict[str, Any]] = [{"model": "checkpoint"} | apart(place / "checkpoint", tokens)]
    forget(place / "packed")
    cold = apart(place / "packed", tokens)
    rows.append({"model": "packed, from the disk", "pack_s": pack_s, "gigabytes": size / 1e9} | cold)
    rows.append({"model": "packed, in the page cache"} | apart(place / "packed", tokens))
    forget(place / "packed")
    with limited(int(size * share) + HELD) as group:
        if group:
            rows.append({"model": f"packed, memory for {share:.0%} of it"} | apart(place / "packed", tokens, group))
    return rows


def main(
    share: Annotated[float, typer.Option(min=0.05, max=1.0, help="Of the files that memory may hold")] = 0.5,
    tokens: Annotated[int, typer.Option(min=2)] = 64,
    folder: Annotated[Path, typer.Option(hidden=True)] = Path(),
    group: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Print a table for people and one JSON line for machines."""
    if folder != Path():
        print(json.dumps(measure(folder, tokens, group)))
        return
    machine = facts()
    introduce(machine)
    with tempfile.TemporaryDirectory() as place:
        rows = rows_of(Path(place), share, tokens)
    head = ("model", "start, s", "tokens/s")
    print(grid(head, [[row["model"], f"{row['start_s']:.2f}", f"{row['tokens_per_s']:.1f}"] for row in rows]))
    print(json.dumps(machine | {"rows": rows}))


if __name__ == "__main__":
    typer.run(main)
