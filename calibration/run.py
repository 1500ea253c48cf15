"""`Run`: one calibration under way, and what a search may ask of it: scores of budgets on text.

Text for decisions and text for reports are apart: a search that looks at `report` would praise itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from calibration.partial import Partial
from calibration.progress import Progress
from calibration.repair_fit import Tables
from calibration.scoring import Score, Scorer, Windows
from engine.engine import Engine
from engine.runner import ModelRunner
from engine.types import EngineInfo
from model.budget import ExpertBudget
from model.expert_range import ExpertRange
from model.shapes.decoder import DecoderConfig


@dataclass(frozen=True, slots=True)
class Run:
    """A loaded engine and the text that it is measured on."""

    model: Path  # of the checkpoint
    work: Path  # where results go; a search may keep files here
    engine: Engine
    runner: ModelRunner
    info: EngineInfo
    counts: tuple[int, ...]  # the uniform counts of the grid, rising; the trained one is among them
    decide: Windows  # text to choose by
    report: Windows  # text that reported figures are of
    repair: Tables  # the engine's, with a row for every count; neutral until a search writes to it
    scorer: Scorer
    partial: Partial
    progress: Progress
    minutes: float  # that the whole calibration may take, about

    @property
    def config(self) -> DecoderConfig:
        """The decoder's shape."""
        return self.runner.model.config

    @property
    def experts(self) -> ExpertRange:
        """The counts that the checkpoint can run."""
        return self.info.experts

    def uniform(self, count: int) -> ExpertBudget:
        """The budget of one count in every layer, with the family's rule."""
        return ExpertBudget((count,) * self.experts.layers)

    def score(self, budgets: Sequence[ExpertBudget], windows: Windows, salt: str = "") -> list[Score]:
        """How each budget answers on these windows, next to the trained count; kept for a run that goes on later.

        Several budgets in one call share the work of the trained count. `salt` names what else decides the outcome,
        such as the hash of repair statistics.
        """
        return self.scorer.score(budgets, windows, salt)
