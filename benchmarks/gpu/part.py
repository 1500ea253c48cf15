"""What one part of a visit is given, and how it gives rows: each is appended to a file at once, so that a visit that is
cut keeps what it has. It does not depend on kernels or models.
"""

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.tables import grid

Row = dict[str, Any]
LOST = "not measured"
WORKERS = 12  # processes side by side: each has a GPU context of its own


@dataclass(frozen=True)
class Part:
    """One part of a visit while it runs. Rows are lines of JSON in `out`, each with its part and the table it is in."""

    name: str
    dry: bool
    ends: float  # on the monotonic clock
    out: Path

    @cached_property
    def device(self) -> torch.device:
        """The GPU; on a dry run the CPU."""
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def left(self) -> float:
        """Seconds until the part must have ended."""
        return self.ends - time.monotonic()

    def add(self, table: str, **values: Any) -> None:
        """One row of a table; a value that is None was not measured."""
        with self.out.open("a") as file:
            file.write(json.dumps({"part": self.name, "table": table} | values) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(f"  {table}: " + ", ".join(f"{key} {shown(value)}" for key, value in values.items()), flush=True)

    def lose(self, what: str, why: str) -> None:
        """Name something that could not be measured."""
        self.add(LOST, what=what, why=why)

    def enough(self, what: str, seconds: float) -> bool:
        """Whether so many seconds are left; where not, `what` is named as not measured."""
        if self.left >= seconds:
            return True
        self.lose(what, f"{self.left:.0f} s are left, {seconds:.0f} s are needed")
        return False

    @contextmanager
    def tried(self, what: str) -> Iterator[None]:
        """Go on after an error inside, naming it."""
        try:
            yield
        except Exception as error:
            self.lose(what, f"{type(error).__name__}: {str(error).strip()[:300]}")

    def share(self, jobs: Sequence[tuple[str, Callable[[], object]]]) -> None:
        """Run named jobs, on a GPU in processes side by side: most of their time is the compilation of kernels.

        The process of the part must not have used the GPU before.
        """
        workers = 1 if self.dry else min(len(jobs), WORKERS, os.cpu_count() or 1)
        if workers == 1:
            self._in_turn(jobs)
            return
        context = multiprocessing.get_context("fork")
        processes = [context.Process(target=self._in_turn, args=(jobs[n::workers],)) for n in range(workers)]
        for process in processes:
            process.start()
        for number, process in enumerate(processes):
            process.join()
            if process.exitcode:
                names = ", ".join(name for name, _ in jobs[number::workers])
                self.lose(f"some of {names}", f"the process died with exit status {process.exitcode}")

    def _in_turn(self, jobs: Sequence[tuple[str, Callable[[], object]]]) -> None:
        for name, job in jobs:
            if self.enough(name, 1):
                with self.tried(name):
                    job()

    def earlier(self, table: str) -> Row:
        """The last row of a table that an earlier part of this visit gave, or nothing."""
        found = [row for row in read_rows(self.out) if row["table"] == table]
        return found[-1] if found else {}


def read_rows(file: Path) -> list[Row]:
    """All rows of a file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def shown(value: Any) -> str:
    """A value for people."""
    if value is None:
        return LOST
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of one part, as a table for each name; the columns are the keys in the order of their first row."""
    parts = []
    for name in dict.fromkeys(row["table"] for row in rows):
        mine = [
            {key: value for key, value in row.items() if key not in ("part", "table")}
            for row in rows
            if row["table"] == name
        ]
        columns = list(dict.fromkeys(key for row in mine for key in row))
        cells = [[shown(row[key]) if key in row else "" for key in columns] for row in mine]
        parts.append(f"**{name}**\n\n{grid(columns, cells)}")
    return "\n\n".join(parts)
