"""One visit to a machine with a GPU: everything that only a GPU can show, in about eleven minutes. `make visit`.

Parts run in order, each in a process of its own, so that one that fails, hangs or breaks its GPU context costs nothing
but itself. A part has a time; it leaves out what does not fit, and is ended when its time is over. Rows are appended to
a file as they come. In the end: a table per part for people, and one line of JSON. `--dry` runs every part on a machine
without a GPU, with toy shapes, kernels in Triton's interpreter: it shows that the parts work, and measures nothing.

It does not depend on kernels or models; the parts do (`card.py`, `bits.py`, …).
"""

import importlib.util
import json
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch  # noqa: F401 - before the parts' processes are forked, which then need not read it again
import typer

from benchmarks.gpu.part import Part, Row, read_rows, tables

GRACE = 0.9  # the share of its time after which a part should have ended by itself


@dataclass(frozen=True, slots=True)
class Plan:
    """A part: a module of this package with a function `run`, and the seconds that it may take."""

    name: str
    seconds: float


PLANS = (
    Plan("card", 20),
    Plan("bits", 50),
    Plan("parity", 80),
    Plan("model", 80),
    Plan("layers", 150),
    Plan("end_to_end", 200),
    Plan("loop", 40),
    Plan("tiles", 60),
)
NAMES = [plan.name for plan in PLANS]


def work(part: Part) -> None:
    """The process of one part, and the head of a group with all that it starts."""
    os.setsid()
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # to ask for a GPU must not use it: a part may fork
    if part.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if importlib.util.find_spec("triton"):
            importlib.import_module("tests.triton_interpreter")
        np.seterr(all="ignore")  # the interpreter computes what is undefined, and leaves it out, as a GPU does
    with part.tried(part.name):
        importlib.import_module(f"benchmarks.gpu.{part.name}").run(part)


def run(plan: Plan, dry: bool, out: Path) -> Row:
    """Run one part to its end or to the end of its time; what became of it."""
    began = time.monotonic()
    part = Part(plan.name, dry, began + GRACE * plan.seconds, out)
    process = multiprocessing.get_context("fork").Process(target=work, args=(part,))
    process.start()
    state = ""
    try:
        process.join(plan.seconds)
    finally:  # also where this process is interrupted
        if process.is_alive():
            os.killpg(process.pid or 0, signal.SIGKILL)
            process.join(10)
            state = f"cut after {plan.seconds:.0f} s"
    if not state:
        state = "ended" if process.exitcode == 0 else f"died with exit status {process.exitcode}"
    return {"part": plan.name, "seconds": round(time.monotonic() - began, 1), "state": state}


def chosen(names: str) -> list[Plan]:
    """The plans of names with commas between them, in the order of a visit.

    Raises:
        typer.BadParameter: there is no such part.
    """
    wanted = names.split(",")
    for name in wanted:
        if name not in NAMES:
            raise typer.BadParameter(f"there is no part {name!r}; parts are {', '.join(NAMES)}")
    return [plan for plan in PLANS if plan.name in wanted]


def report(rows: list[Row], states: list[Row]) -> str:
    """The tables of all parts, and what became of each."""
    pages = []
    for state in states:
        mine = [row for row in rows if row["part"] == state["part"]]
        pages.append(f"## {state['part']}: {state['state']}, {state['seconds']} s\n\n{tables(mine)}")
    return "\n\n".join(pages)


def main(
    parts: Annotated[
        str, typer.Option(help=f"of {','.join(NAMES)}; in two calls where one is limited in time")
    ] = ",".join(NAMES),
    dry: Annotated[bool, typer.Option(help="toy shapes on this machine's CPU")] = False,
    scale: Annotated[float, typer.Option(help="multiplies the time of every part")] = 1.0,
    out: Annotated[Path, typer.Option(help="the file that rows are appended to")] = Path("visit.jsonl"),
) -> None:
    """Print tables for people and one JSON line for machines."""
    plans = [Plan(plan.name, plan.seconds * scale) for plan in chosen(parts)]
    out.parent.mkdir(parents=True, exist_ok=True)
    before = len(read_rows(out))
    states: list[Row] = []
    for plan in plans:
        print(f"{plan.name}: at most {plan.seconds:.0f} s", flush=True)
        states.append(run(plan, dry, out))
    rows = read_rows(out)[before:]
    print(f"\n{report(rows, states)}\n", flush=True)
    print(json.dumps(summary(dry, states, rows)))


def summary(dry: bool, states: list[Row], rows: list[Row]) -> dict[str, Any]:
    """What the JSON line holds."""
    date = datetime.now(UTC).isoformat(timespec="minutes")
    return {"date": date, "dry": dry, "parts": states, "rows": rows}


if __name__ == "__main__":
    typer.run(main)
