"""The options of a calibration that the loaded model can run, cheapest first, and found by name.

Not here: which of them a request gets (see `server/experts/policies.py`).
"""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from model.budget import ExpertBudget
from model.errors import InvalidRequest, shown
from model.expert_range import ExpertRange
from server.experts.calibration import UNCALIBRATED, ServedCalibration
from weights.calibration import Option

NO_CALIBRATION = "no_calibration"  # code of a refusal


@dataclass(frozen=True, slots=True)
class CalibratedOptions:
    """The options that the loaded model can run, cheapest first; or none, and why, with what to do about it."""

    options: tuple[Option, ...] = ()
    profiles: Mapping[str, ExpertBudget] = field(default_factory=dict)
    reason: str = UNCALIBRATED.reason

    @classmethod
    def build(cls, served: ServedCalibration, experts: ExpertRange) -> "CalibratedOptions":
        """The options of the served checkpoint, without those that the model cannot run as it was loaded."""
        found = served.calibration
        if found is None:
            return cls(reason=served.reason)
        options = [option for option in found.options if _runs(option.budget, experts)]
        profiles = {name: ExpertBudget(counts) for name, counts in found.profiles.items()}
        runnable = {name: budget for name, budget in profiles.items() if _runs(budget, experts)}
        options.sort(key=lambda option: (option.relative_cost, -option.quality.relative))
        return cls(tuple(options), runnable, "the model as it was loaded runs none of the options of its calibration")

    def require(self, field: str) -> tuple[Option, ...]:
        """The options. Raises InvalidRequest where there are none, naming the field that needs them."""
        if not self.options:
            raise InvalidRequest(f"{field} needs a calibration: {self.reason}", field, NO_CALIBRATION)
        return self.options

    def named(self, name: str, field: str) -> ExpertBudget:
        """The budget of an option or of a profile. Raises InvalidRequest where there is none of this name."""
        found = {option.name: option.budget for option in self.require(field)}
        budgets = dict(self.profiles) | found
        if name not in budgets:
            close = difflib.get_close_matches(name[:64], budgets, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"the calibration has {', '.join(budgets)}"
            raise InvalidRequest(f"{field}: {shown(name)} is not in the calibration; {hint}", field)
        return budgets[name]

    def option_of(self, budget: ExpertBudget, names: Collection[str] | None = None) -> Option | None:
        """The option that is this budget; where `names` are given, only one of them."""
        found = (option for option in self.options if option.budget == budget)
        return next((option for option in found if names is None or option.name in names), None)


def _runs(budget: ExpertBudget, experts: ExpertRange) -> bool:
    """Whether the loaded model can run a budget."""
    try:
        experts.budget(budget.per_layer, "calibration")
        experts.check_rule(budget.rule, "calibration")
    except InvalidRequest:
        return False
    return True
