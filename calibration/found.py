"""What a search adds to the uniform counts: further options, and the choices that requests may name.

Plain values. Not here: the searches themselves, and how options are measured (see `calibration/measure.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from calibration.run import Run
from model.budget import ExpertBudget, ExpertCounts, Normaliser


@dataclass(frozen=True, slots=True)
class Found:
    """The result of one search. Fields as in `weights.calibration.Calibration`.

    `options` are measured on the reported text and for speed, as the uniform counts are. `repair_file` is a file of
    statistics, which is moved to its place beside the calibration; it belongs to `repaired`.
    """

    options: dict[str, ExpertBudget] = field(default_factory=dict)
    profiles: dict[str, ExpertCounts] = field(default_factory=dict)
    normalisers: dict[str, Normaliser] = field(default_factory=dict)
    thresholds: dict[str, float] = field(default_factory=dict)
    repaired: tuple[int, ...] = ()
    repair_file: Path | None = None


Search = Callable[[Run], Found]
