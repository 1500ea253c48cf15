"""Progress of a calibration: a bar with the time left in a terminal, a line every few seconds elsewhere.

It writes to the standard error stream and knows stages and steps, not what they are.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

SECONDS = 5.0  # between two lines


class Progress:
    """Stages of known length, one after another; a bar vanishes when its stage ends."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)

    def say(self, text: str) -> None:
        """One line above the bar."""
        print(text, file=sys.stderr)

    @contextmanager
    def stage(self, name: str, steps: int) -> Iterator["Stage"]:
        """One stage of so many steps, which the caller counts with `advance`."""
        if not self._console.is_terminal:
            yield Stage(name, steps)
            return
        parts = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Bars(*parts, TimeRemainingColumn(), console=self._console, transient=True) as bars:
            yield Stage(name, steps, bars)


class Stage:
    """How far one stage is."""

    def __init__(self, name: str, steps: int, bars: Bars | None = None) -> None:
        self._name, self._steps, self._bars = name, steps, bars
        self._task = bars.add_task(name, total=steps) if bars else None
        self._done, self._computed = 0, 0
        self._started = self._said = time.monotonic()

    def advance(self, computed: bool = True) -> None:
        """One step more is done. A step that an earlier run had computed says nothing about the time left."""
        self._done += 1
        self._computed += computed
        if self._bars is not None and self._task is not None:
            self._bars.advance(self._task)
        elif time.monotonic() - self._said > SECONDS:
            self._said = time.monotonic()
            print(f"{self._name}: {self._done} of {self._steps}, {self.seconds_left():.0f} s left", file=sys.stderr)

    def seconds_left(self) -> float:
        """At the pace of the steps computed in this run."""
        elapsed = time.monotonic() - self._started
        return elapsed / max(1, self._computed) * (self._steps - self._done)
