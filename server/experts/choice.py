"""Chooses the expert budget of a call's sequences: the request's own, or the server's choice when the first of them
starts.

It depends on options and a load, not on a queue or an engine process.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from model.budget import ExpertBudget
from server.cascade import Cascade
from server.experts.options import CalibratedOptions
from server.experts.policies import Decision, Load, decide
from server.experts.selection import Selection
from weights.calibration import Option

ADAPT_SECONDS = 0.2  # between two decisions while an answer is generated
SPARE = 0.9  # of the bound that an option with more work must keep to be taken in the middle of an answer
ChosenBy = Literal["request", "auto", "brownout"]


@dataclass(frozen=True, slots=True)
class Chooser:
    """Chooses for all calls. `load(n)`: the load with n further sequences. `lowered`, with brownout: the option that
    replaces the default now, if any. `on_lowered` is called with the number of sequences that got it."""

    options: CalibratedOptions
    load: Callable[[int], Load]
    lowered: Callable[[], Option | None] | None = None
    on_lowered: Callable[[int], None] = lambda _: None

    def choice(self, selection: Selection, sequences: int) -> "ExpertChoice":
        """The choice for a call of so many sequences."""
        return ExpertChoice(self, selection, sequences, selection.budget)


@dataclass(slots=True)
class ExpertChoice:
    """The choice for one call. `budget` is its present budget, which may change until `begin`."""

    chooser: Chooser
    selection: Selection
    sequences: int
    budget: ExpertBudget
    begun: bool = False
    by: ChosenBy | None = None
    decision: Decision | None = None

    @property
    def settled(self) -> bool:
        """Whether `budget` is the one that its tokens get, and final."""
        if self.cascade is not None:
            return False  # each answer has one of two
        open = self.selection.auto is not None or (self.chooser.lowered is not None and not self.selection.named)
        return self.begun or not open

    @property
    def cascade(self) -> Cascade | None:
        """What decides whether an answer is made again; None without a cascade. `budget` is that of first runs."""
        return self.selection.cascade

    @property
    def interval(self) -> float | None:
        """Seconds between two decisions while the sequences run; None: there is only the first."""
        return ADAPT_SECONDS if self.selection.auto is not None and self.selection.auto.adapt else None

    def begin(self) -> ExpertBudget:
        """The budget of a sequence that starts now. All sequences of a call get what its first one got."""
        if not self.begun:
            self.begun = True
            self._choose()
        return self.budget

    def _choose(self) -> None:
        selection, chooser = self.selection, self.chooser
        if selection.auto is not None:
            load = chooser.load(self.sequences - 1)
            self._take(decide(chooser.options.options, selection.auto, load), "auto")
        elif selection.option:
            option = next(one for one in chooser.options.options if one.name == selection.option)
            self.by, self.decision = "request", Decision(option)
        elif chooser.lowered is not None and not selection.named and (cheaper := chooser.lowered()) is not None:
            self._take(Decision(cheaper), "brownout")
            chooser.on_lowered(self.sequences)

    def _take(self, decision: Decision, by: ChosenBy) -> None:
        self.by, self.decision, self.budget = by, decision, decision.option.budget

    def again(self) -> ExpertBudget | None:
        """The budget for the tokens from here on, if it is another one at the load of now. Only counts change: options
        with another rule than the first one's are left out."""
        auto = self.selection.auto
        if auto is None or self.decision is None:
            return None
        before, load = self.decision.option, self.chooser.load(0)
        options = [one for one in self.chooser.options.options if one.budget.rule == self.budget.rule]
        decision = decide(options, auto, load)
        if decision.option.relative_cost > before.relative_cost:  # only with room to spare, or it would swing
            decision = decide(options, auto.tightened(SPARE), load)
            if decision.option.relative_cost <= before.relative_cost:
                return None
        if decision.option.budget == self.budget:
            return None
        self._take(decision, "auto")
        return self.budget

    def report(self) -> dict[str, Any] | None:
        """What an answer says of an option of the calibration that it got; None where it got none by that name."""
        if self.decision is None or self.by is None:
            return None
        option, decision = self.decision.option, self.decision
        report: dict[str, Any] = {
            "option": option.name,
            "chosen_by": self.by,
            "relative_quality": round(option.quality.relative, 4),
        }
        if decision.bound_met is not None:
            report["predicted_itl_ms"] = round(decision.predicted_itl_ms or 0.0, 3)
            report["bound_met"] = decision.bound_met
        return report
