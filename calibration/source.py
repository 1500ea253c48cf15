"""Chooses what is scored: how much text fits the time, from the given files or from the model itself.

How much is measured once and kept, so that a calibration that goes on later scores the same text.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from calibration.partial import Partial
from calibration.progress import Progress
from calibration.sampled import sample_windows
from calibration.scoring import Scorer, Windows
from calibration.texts import read_texts, split
from engine.engine import Engine
from model.budget import ExpertBudget
from model.errors import CheckpointError
from weights.tokenizer import Tokenizer

SCORING_SHARE = 0.4  # of the time, for scoring the uniform counts; the rest is for searches, tasks and timing
MAX_TOKENS, MAX_SAMPLED = 65536, 24576  # of a text, both parts together; the model writes slower than it reads
MIN_WINDOWS = 8


@dataclass(frozen=True, slots=True)
class Source:
    """Where the text comes from; `length` tokens are scored in a row."""

    paths: tuple[Path, ...]
    tokenizer: Tokenizer | None
    vocabulary: int
    length: int
    minutes: float

    def windows(
        self, engine: Engine, scorer: Scorer, budgets: list[ExpertBudget], partial: Partial, progress: Progress
    ) -> tuple[Windows, Windows]:
        """The windows to decide by and those to report on. `budgets` are scored; the last is the trained count's.

        Raises:
            CheckpointError: a file cannot be used.
        """
        if (tokens := partial.get("tokens")) is None:
            tokens = self._affordable(scorer, budgets)
            partial.put("tokens", tokens)
        if self.paths:
            if self.tokenizer is None:
                raise CheckpointError("--text needs a tokenizer.json beside the weights")
            return split(read_texts(self.paths, self.tokenizer, self.length, tokens))
        if (texts := partial.get("sampled")) is None:
            rows = max(MIN_WINDOWS, min(tokens, MAX_SAMPLED) // self.length)
            texts = sample_windows(engine, budgets[-1], self._start(), self.length, rows, progress)
            partial.put("sampled", texts)
        return split([[tuple(text) for text in texts]])

    def described(self, report: Windows) -> str:
        """What is scored, in words."""
        size = f"{len(report.windows)} windows"
        if not self.paths:
            return f"{size} that the model wrote at the trained count, temperature 1, fixed seeds"
        return f"{size} of {', '.join(path.name for path in self.paths)}"

    def _start(self) -> tuple[int, ...]:
        """What a text begins with: what the tokenizer puts there, or an end of text."""
        if self.tokenizer is None:
            return (0,)
        return tuple(self.tokenizer.encode("")[:1]) or self.tokenizer.eos_ids[:1] or (0,)

    def _affordable(self, scorer: Scorer, budgets: list[ExpertBudget]) -> int:
        """How many tokens can be scored at all counts in their share of the time, at most `MAX_TOKENS`."""
        window = tuple(i * 7919 % self.vocabulary for i in range(self.length + 1))
        seconds = 0.0
        for _ in range(2):  # the first is slower than any other
            started = time.perf_counter()
            for budget in budgets:
                scorer.read(window, budget)
            seconds = time.perf_counter() - started
        rows = int(self.minutes * 60 * SCORING_SHARE / seconds)
        return self.length * max(MIN_WINDOWS, min(rows, MAX_TOKENS // self.length))
