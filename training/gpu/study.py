"""The study behind the bundled models: many small networks on the same tokens, one line of JSON each.

Run `python -m training.gpu.study --set first --tokens tokens.npy --heldout held.npy --out first.jsonl`;
`docs/training.md` has the tables. Rows stop being started at the deadline; several processes share the device.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor

from training.gpu.evaluation import evaluate, spreads
from training.gpu.loop import Windows, train
from training.gpu.network import Network
from training.gpu.study_sets import SETS, Run

COUNTS = (1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class Job:
    """What the processes of one study share."""

    rows: str  # a name in `SETS`
    tokens: Path
    heldout: Path
    out: Path
    steps: int
    processes: int
    deadline: float


def perform(run: Run, tokens: NDArray[np.uint16], held: Tensor, steps: int) -> dict[str, Any]:
    """Train and measure one network on the device of the held-out windows."""
    torch.manual_seed(run.plan.seed)
    net = Network(run.shape).to(held.device)
    plan = replace(run.plan, steps=steps)
    windows = Windows(tokens, plan.length, plan.seed, held.device)
    result = train(net, windows, plan, lambda text: None)
    counts = [count for count in COUNTS if count <= run.shape.largest]
    found = {"name": run.name, "seconds": result["seconds"], "quality": evaluate(net, held, counts)}
    if run.shape.kind == "infinity":
        found["spread"] = spreads(net, held[:16])
    return found


def work(job: Job, worker: int) -> None:
    """Perform every n-th row until the deadline."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens = np.load(job.tokens)
    held = torch.from_numpy(np.load(job.heldout).astype(np.int64)).to(device)
    for run in SETS[job.rows][worker :: job.processes]:
        if time.time() > job.deadline:
            return
        try:
            found = perform(run, tokens, held, job.steps)
        except Exception as error:  # one failed row must not cost the others
            found = {"name": run.name, "error": f"{type(error).__name__}: {error}"}
        with job.out.open("a") as file:
            file.write(json.dumps(found) + "\n")


def start(job: Job, worker: int) -> subprocess.Popen[bytes]:
    """A process that performs the rows of one worker."""
    command = [sys.executable, "-m", "training.gpu.study", "--set", job.rows, "--steps", job.steps]
    command += ["--tokens", job.tokens, "--heldout", job.heldout, "--out", job.out]
    command += ["--processes", job.processes, "--deadline", job.deadline, "--worker", worker]
    return subprocess.Popen([str(word) for word in command], env=os.environ | {"OMP_NUM_THREADS": "1"})


def table(out: Path, runs: tuple[Run, ...]) -> str:
    """The results as a table of text: loss and percentage of the wide layer per count, evenness, spreads, seconds."""
    order = {run.name: number for number, run in enumerate(runs)}
    found = [json.loads(line) for line in out.read_text().splitlines()]
    found.sort(key=lambda each: order[each["name"]])
    return "\n".join(map(_line, found))


def _cell(quality: dict[str, Any]) -> str:
    used = 100 * quality.get("used", 0)
    return f"{quality['loss']:.3f} ({used:.0f})"


def _line(found: dict[str, Any]) -> str:
    name = f"{found['name']:58} "
    if "error" in found:
        return name + found["error"][:100]
    cells = map(_cell, found["quality"])
    evenness = found["quality"][0].get("evenness", "")
    losses = "  ".join(f"{cell:>11}" for cell in cells)
    return f"{name}{losses}  {evenness} {found.get('spread', '')} {found['seconds']}s"


def main(
    tokens: Annotated[Path, typer.Option()],
    heldout: Annotated[Path, typer.Option()],
    out: Annotated[Path, typer.Option(help="appended to, one line a row; a file for each set")],
    rows: Annotated[str, typer.Option("--set", help="first, second or open")] = "first",
    steps: int = 400,
    seconds: float = 600,
    processes: int = 3,
    worker: Annotated[int, typer.Option(hidden=True)] = -1,
    deadline: Annotated[float, typer.Option(hidden=True)] = 0,
) -> None:
    """Run one set of the study and print its table."""
    if rows not in SETS:
        raise typer.BadParameter(f"--set must be one of {', '.join(SETS)}, got {rows!r}")
    ends = deadline or time.time() + seconds
    job = Job(rows, tokens, heldout, out, steps, processes, ends)
    if worker >= 0:
        torch.set_num_threads(1)
        work(job, worker)
        return
    out.touch()
    for child in [start(job, number) for number in range(processes)]:
        child.wait()
    print(table(out, SETS[rows]))


if __name__ == "__main__":
    typer.run(main)
