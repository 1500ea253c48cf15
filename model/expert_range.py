"""What counts and routing rules a loaded model can run, and the refusal of all others.

Standard library only: the HTTP process, the scheduler and the model all read these values.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from model.budget import FAMILY_RULE, MAX_MOVED, OWN_FIELDS, ExpertBudget, RoutingRule
from model.contrast import Contrast
from model.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class ExpertRange:
    """The counts that a loaded model can run: `layers` MoE layers, each from `minimum` to `maximum` experts.

    And which routing rules: `rule_refusal`, `repair_refusal` and `set_refusal` say why none, no repair, or no set of
    experts is taken; `own_fields` are those of OWN_FIELDS that are taken all the same. `adaptive`: the counts are upper
    bounds under every rule, and how many experts run depends on the token.
    """

    layers: int
    trained: int
    minimum: int
    maximum: int
    rule_refusal: str = ""  # of every field of a rule but repair, kept and `own_fields`
    repair_refusal: str = ""
    set_refusal: str = ""
    total: int = 0  # experts of each layer
    repaired: tuple[int, ...] = ()  # counts whose repair the calibration says helps; empty: there are no tables
    own_fields: tuple[str, ...] = ()
    adaptive: bool = False

    def budget(self, count: int | Sequence[int], param: str = "num_experts") -> ExpertBudget:
        """Turn one count, or one per MoE layer, into a budget.

        Raises:
            InvalidRequest: a count outside the range, or a list of the wrong length; names `param`.
        """
        per_layer = (count,) * self.layers if isinstance(count, int) else tuple(count)
        if self.layers == 0:
            raise InvalidRequest(f"{param} was given, but this model has no mixture-of-experts layers", param)
        if len(per_layer) != self.layers:
            raise InvalidRequest(
                f"{param} has {len(per_layer)} entries; this model has {self.layers} MoE layers", param
            )
        for value in per_layer:
            if isinstance(value, bool) or not isinstance(value, int):
                raise InvalidRequest(f"{param} must be an integer, got {value!r:.64}", param, "invalid_type")
            if value != self.trained and self.minimum == self.maximum:
                raise InvalidRequest(
                    f"{param} can only be {self.trained}, the trained count: this model's router is made for no other;"
                    f" got {value!r:.64} (an operator may allow it with --allow-extrapolated-experts)",
                    param,
                )
            if not self.minimum <= value <= self.maximum:
                raise InvalidRequest(
                    f"{param} must be between {self.minimum} and {self.maximum} for this model, got {value!r:.64}",
                    param,
                )
        return ExpertBudget(per_layer)

    def check(self, budget: ExpertBudget, param: str) -> None:
        """Refuse a rule or a contrast that this model cannot run, and counts that the rule leaves too few experts for.

        Raises:
            InvalidRequest: names the field as `param`.name.
        """
        rule, most = budget.rule, max(budget.counts, default=0)
        self.check_rule(rule, param)
        kept = self.left_by(rule)
        if rule.kept and max(most, self.trained) > kept:
            wanted = f"the count {most}" if most > kept else f"the trained count {self.trained}"
            raise InvalidRequest(f"{param}.set keeps {kept} experts of a layer, fewer than {wanted}", f"{param}.set")
        if isinstance(rule.normaliser, int) and rule.normaliser > kept:
            reason = f"k2={rule.normaliser} is more than the {kept} experts of a layer that {param}.set keeps"
            raise InvalidRequest(f"{param}.normaliser {reason}", f"{param}.normaliser")
        if rule.skip and rule.skip + most > kept:
            left = f"{kept - rule.skip} of the {kept} experts that a token may run"
            raise InvalidRequest(
                f"{param}.skip={rule.skip} leaves {left}, fewer than the count {most}", f"{param}.skip"
            )
        if budget.contrast is not None:
            self.check_contrast(budget.contrast, rule, f"{param}.contrast")

    def check_contrast(self, contrast: Contrast, rule: RoutingRule, param: str) -> None:
        """The same of a contrast beside this rule; also of one whose beta is 0, which no budget has."""
        reason = self.rule_refusal if self.layers else "this model has no mixture-of-experts layers"
        if reason:
            raise InvalidRequest(f"{param} is refused: {reason}", param)
        contrast.check(self.left_by(rule), param)

    def left_by(self, rule: RoutingRule) -> int:
        """How many experts of a layer a token may choose among."""
        return min((layer.count("1") for layer in rule.kept), default=self.maximum)

    def check_rule(self, rule: RoutingRule, param: str) -> None:
        """Refuse what this model cannot do, by the name of the rule's field.

        Raises:
            InvalidRequest: names the field as `param`.name.
        """
        for name in ("normaliser", "threshold", "top_p", "reuse", "skip", "repair", "kept", *OWN_FIELDS):
            if getattr(rule, name) != getattr(FAMILY_RULE, name) and (fault := self._rule_fault(rule, name)):
                field = f"{param}.{'set' if name == 'kept' else name}"
                raise InvalidRequest(f"{field} {fault}", field)

    def _rule_fault(self, rule: RoutingRule, name: str) -> str:
        """What is wrong with one field of a rule that is not the family's; empty: nothing."""
        value = getattr(rule, name)
        if self.layers == 0:
            return "was given, but this model has no mixture-of-experts layers"
        if name == "repair":
            tables = "" if self.repaired else "no calibration with repair statistics was loaded (`moedial calibrate`)"
            reason = self.repair_refusal or tables
            return f"is refused: {reason}" if reason else ""
        if name in OWN_FIELDS:
            return self._own_fault(name, value)
        if name == "kept":
            return self._set_fault(value)
        if self.rule_refusal:
            return f"is refused: {self.rule_refusal}"
        if name in ("threshold", "top_p") and not 0 <= value <= 1:
            return f"must be between 0 and 1, got {value!r:.64}"
        if name == "reuse" and not 0 <= value <= self.maximum:
            return f"must be between 0 and {self.maximum} for this model, got {value!r:.64}"
        if name == "skip" and not 0 <= value < self.maximum:
            return f"must be between 0 and {self.maximum - 1} for this model, got {value!r:.64}"
        if name == "normaliser" and value not in ("raw", "kept") and not 1 <= int(value) <= self.maximum:
            return f"k2={value!r:.64} must be between 1 and {self.maximum} for this model"
        return ""

    def _set_fault(self, kept: tuple[str, ...]) -> str:
        """The same of the experts that may run."""
        if self.set_refusal:
            return f"is refused: {self.set_refusal}"
        if len(kept) != self.layers or any(len(layer) != self.total or set(layer) - {"0", "1"} for layer in kept):
            return f"must say of {self.layers} layers which of {self.total} experts are kept"
        return ""

    def _own_fault(self, name: str, value: float) -> str:
        """The same of a field that only some kinds take."""
        if name not in self.own_fields:
            return f"is refused: {self.rule_refusal or OWN_FIELDS[name]}"
        if not -MAX_MOVED <= value <= MAX_MOVED:
            return f"must be between {-MAX_MOVED:g} and {MAX_MOVED:g}, got {value!r:.64}"
        return ""
