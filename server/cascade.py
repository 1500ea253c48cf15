"""A cascade: an answer is made with few experts, and made again with more where the model was unsure of it.

The value and its decision. Not here: reading it from a request (see `server/experts`) and running it (see
`server/generation`).
"""

from dataclasses import dataclass

from engine.types import Measure
from model.budget import ExpertBudget


@dataclass(frozen=True, slots=True)
class Cascade:
    """Two budgets, and the mean over an answer's tokens by which it is made again.

    The measure is of the model's own distribution of each token: its entropy in nats, or its margin, the difference of
    the two largest probabilities.
    """

    low: ExpertBudget
    high: ExpertBudget
    by: Measure
    threshold: float

    def unsure(self, mean: float) -> bool:
        """Whether an answer at `low` with this mean is made again at `high`."""
        return mean > self.threshold if self.by == "entropy" else mean < self.threshold
