"""Rounds of a measurement, in each of which every system takes its turn, and what all rounds say of one configuration.
It measures nothing and knows no system."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol


class Run(Protocol):
    """One measured run, tokens per second."""

    @property
    def prefill(self) -> float: ...

    @property
    def decode(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Rounds:
    """So many rounds, of which none but the first begins after so many minutes."""

    times: int
    minutes: float

    def __iter__(self) -> Iterator[int]:
        """The numbers of the rounds; prints how many there were where the minutes ended them."""
        started = time.monotonic()
        for number in range(self.times):
            if number and time.monotonic() - started > 60 * self.minutes:
                print(f"stopped after {number} of {self.times} rounds: over {self.minutes:g} minutes", flush=True)
                return
            yield number


def figures(runs: Sequence[Run]) -> dict[str, Any]:
    """The median of prefill and of decode, and the same figures of each run in the order of the rounds."""
    return {
        "prefill": median(run.prefill for run in runs),
        "decode": median(run.decode for run in runs),
        "runs": [{"prefill": run.prefill, "decode": run.decode} for run in runs],
    }
