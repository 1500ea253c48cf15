"""Times steps of the engine at several budgets in turns, so that a slow spell of the machine hits all of them alike.

Medians over the rounds. It scores nothing.
"""

import time
from collections.abc import Callable, Sequence
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
MIN_ROUNDS, MAX_ROUNDS = 7, 31


@dataclass(frozen=True, slots=True)
class Clock:
    """Times one engine, which has no other work."""

    engine: Engine
    vocabulary: int
    length: int  # the longest sequence
    now: Callable[[], float] = time.perf_counter  # or the processor's time, which others on the machine take none of

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
        started = self.now()
        self._drain()
        return (self.now() - started) / steps

    def _prefill(self, budget: ExpertBudget, tokens: int) -> float:
        self._add(budget, 1, tokens, 1)
        started = self.now()
        self._drain()
        return self.now() - started

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


def measure(
    clock: Clock, budgets: Sequence[ExpertBudget], seconds: float, partial: Partial, progress: Progress
) -> list[Speed]:
    """The speed of each budget: medians over as many rounds as fit the time, between the two bounds above."""
    key = "speed " + " ".join(repr(budget) for budget in budgets)
    done: dict[str, Any] = partial.get(key) or {"wanted": 0, "rounds": []}
    rounds: list[list[dict[str, float]]] = done["rounds"]
    if not done["wanted"]:
        done["wanted"] = _affordable(clock, budgets, seconds)
    with progress.stage("timing", done["wanted"]) as stage:
        for number in range(done["wanted"]):
            computed = number >= len(rounds)
            if computed:
                rounds.append([clock.round(budget) for budget in budgets])
                partial.put(key, done)
            stage.advance(computed)
    return [_speed([row[i] for row in rounds]) for i in range(len(budgets))]


def _affordable(clock: Clock, budgets: Sequence[ExpertBudget], seconds: float) -> int:
    """How many rounds fit the time, by the second of two, since the first of all steps is slower than others."""
    clock.round(budgets[0])
    started = time.perf_counter()
    clock.round(budgets[-1])
    each = (time.perf_counter() - started) * len(budgets)
    return max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / each)))


def _speed(rounds: Sequence[dict[str, Any]]) -> Speed:
    seconds = {name: median(row[name] for row in rounds) for name in rounds[0]}
    return Speed(
        itl_ms={str(batch): seconds[str(batch)] * 1e3 for batch in BATCHES},
        tokens_per_second={str(batch): batch / seconds[str(batch)] for batch in BATCHES},
        prefill_tokens_per_second=1 / seconds["prefill"],
    )
