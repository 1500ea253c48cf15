"""Times steps of the engine at several budgets in turns, so that a slow spell of the machine hits all of them alike.

Medians over the rounds. It scores nothing.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from calibration.partial import Partial
from calibration.progress import Progress
from engine.engine import Engine
from engine.types import Request, Sampling
from model.budget import ExpertBudget
from weights.calibration import Speed

BATCHES = (1, 16)
PROMPT, STEPS, PREFILL = 32, 16, 256  # tokens: before decoding steps, of them, of a prompt that is timed alone
ROUNDS = 7


@dataclass(frozen=True, slots=True)
class Clock:
    """Times one engine, which has no other work."""

    engine: Engine
    vocabulary: int
    length: int  # the longest sequence

    def round(self, budget: ExpertBudget) -> dict[str, float]:
        """Seconds of one decoding step by batch, and of one prompt's token."""
        found = {str(batch): self._decode(budget, batch) for batch in BATCHES}
        tokens = min(PREFILL, self.length - 1)
        return found | {"prefill": self._prefill(budget, tokens) / tokens}

    def _decode(self, budget: ExpertBudget, batch: int) -> float:
        """Mean seconds of a decoding step."""
        prompt = max(1, min(PROMPT, self.length - STEPS - 1))
        steps = min(STEPS, self.length - prompt - 1)
        self._add(budget, batch, prompt, steps + 1)
        self._until_first(batch)
        started = time.perf_counter()
        self._drain()
        return (time.perf_counter() - started) / steps

    def _prefill(self, budget: ExpertBudget, tokens: int) -> float:
        self._add(budget, 1, tokens, 1)
        started = time.perf_counter()
        self._drain()
        return time.perf_counter() - started

    def _add(self, budget: ExpertBudget, batch: int, prompt: int, generated: int) -> None:
        """Greedy requests with different prompts, so that routing is spread over the experts."""
        for row in range(batch):
            tokens = tuple((7919 * row + 104729 * i) % self.vocabulary for i in range(prompt))
            sampling = Sampling(generated, seed=row, temperature=0.0)
            self.engine.add(Request(f"timed-{row}", tokens, budget, sampling))

    def _until_first(self, batch: int) -> None:
        """Step until every request has its first token."""
        seen: set[str] = set()
        while len(seen) < batch and self.engine.has_work:
            seen |= {event.request_id for event in self.engine.step().events}

    def _drain(self) -> None:
        while self.engine.has_work:
            self.engine.step()


def measure(clock: Clock, budgets: Sequence[ExpertBudget], partial: Partial, progress: Progress) -> list[Speed]:
    """The speed of each budget: medians of `ROUNDS` rounds after one that warms up."""
    key = "speed " + " ".join(repr(budget) for budget in budgets)
    rounds: list[list[dict[str, float]]] = partial.get(key) or []
    if len(rounds) < ROUNDS:
        clock.round(budgets[0])
    with progress.stage("timing", ROUNDS * len(budgets)) as stage:
        for number in range(ROUNDS):
            computed = number >= len(rounds)
            row = [] if computed else rounds[number]
            for budget in budgets:
                if computed:
                    row.append(clock.round(budget))
                stage.advance(computed)
            if computed:
                rounds.append(row)
                partial.put(key, rounds)
    return [_speed([row[i] for row in rounds]) for i in range(len(budgets))]


def _speed(rounds: Sequence[dict[str, Any]]) -> Speed:
    seconds = {name: median(row[name] for row in rounds) for name in rounds[0]}
    return Speed(
        itl_ms={str(batch): seconds[str(batch)] * 1e3 for batch in BATCHES},
        tokens_per_second={str(batch): batch / seconds[str(batch)] for batch in BATCHES},
        prefill_tokens_per_second=1 / seconds["prefill"],
    )
