"""What a request may spend on experts, and what counts a checkpoint can run.

Standard library only: the HTTP process, the scheduler and the model all read these values.
Not here: how a count becomes work (see `model/moe/`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from model.contrast import Contrast
from model.errors import InvalidRequest

MOST_MOVED = 100.0  # of a router's logits, in either direction
# Fields of a rule that only some kinds of mixtures take, and why others do not.
OWN_FIELDS = {
    "gate_offset": "this model's experts have no gates of their own",
    "free_bias": "this model has no experts that compute nothing",
}

ExpertCounts = tuple[int, ...]  # of one token: one expert count per MoE layer
CountRun = tuple[ExpertCounts, int]  # counts, and how many neighbouring positions have them
CountChange = tuple[int, ExpertCounts]  # the first position that has these counts
Normaliser = Literal["trained", "raw", "kept"] | int


@dataclass(frozen=True, slots=True)
class RoutingRule:
    """How a token's experts are chosen and weighted, beside its count. `docs/experts.md` names the papers.

    `normaliser` applies where the count is below the trained one; at and above it weights are always the family's own.
    With p the router's scores, best first, and M = Σ p over the trained count (1 in families that normalise):
    "trained" is the family's rule, "raw" is p, "kept" is p · M / Σ p over the experts that run, and n is
    p · M / Σ p over the n best, whether they run or not. In families that normalise, "kept" is the family's rule.

    `threshold` and `top_p` end a token's choice at the first expert that fails them, so that fewer experts are always
    the first of more; the best one always runs. `reuse` comes after them: with S the experts that all tokens of the
    batch run in this layer so far, a token adds those of S that follow its own in its order, `reuse` of them at most.
    It is the one rule with which an answer depends on who shares the batch.

    With `skip`, the first experts of a token's order do not run: its count is of those after them, and `threshold`,
    `top_p` and `reuse` apply as if the order began there. Weights are as above, over those that run. Rank-k routing of
    SCMoE (arXiv 2405.14507) is skip k - 1 and count 1: the expert weighs 1 in families that normalise, else p.

    With `kept`, the router's logits of other experts are minus infinity: choice, weights and all of the above are as in
    a model that has the kept experts alone.

    `gate_offset` and `free_bias` are for the kinds of mixtures that take them (`OWN_FIELDS`).
    """

    normaliser: Normaliser = "trained"
    threshold: float = 0.0  # an expert runs only if its score is at least this part of the best one's; 0: all
    top_p: float = 0.0  # experts run up to and with the one that brings their share of all scores to this; 0: all
    repair: bool = False  # each layer's output is brought to its mean and spread at the trained count
    reuse: int = 0  # a token adds up to this many of its next best experts that its batch runs anyway; 0: none
    gate_offset: float = 0.0  # added to the logit of every expert's gate: more of them open, or fewer
    free_bias: float = 0.0  # added to the logits of experts that compute nothing, for choosing, not for weighing
    skip: int = 0  # the first so many experts of a token's order do not run
    kept: tuple[str, ...] = ()  # of each MoE layer "1" for an expert that may run, else "0"; empty: all may

    @property
    def adaptive(self) -> bool:
        """Whether how many experts run depends on the token, also in kinds where it does not by itself."""
        return bool(self.threshold or self.top_p or self.reuse)

    @property
    def ranks(self) -> bool:
        """Whether it changes which experts of a token's order run, or how they weigh."""
        return self.adaptive or self.normaliser != "trained" or self.skip > 0

    @property
    def reroutes(self) -> bool:
        """Whether it changes which experts run, or how they weigh."""
        return self.ranks or bool(self.gate_offset or self.free_bias or self.kept)


FAMILY_RULE = RoutingRule()


@dataclass(frozen=True, slots=True)
class ExpertBudget:
    """What the tokens of a request may use: one expert count per MoE layer, for prompt positions possibly another.

    The engine asks for the counts of positions (`at`, `runs`), never for `per_layer`: a rule by which they differ is a
    field here and its line in these two. The prefix cache is keyed by the counts of the positions of a block.
    """

    per_layer: ExpertCounts  # of generated positions, and of prompt positions that have no counts of their own
    prefill: ExpertCounts = ()  # of prompt positions; empty: the same as of others
    rule: RoutingRule = FAMILY_RULE
    changes: tuple[CountChange, ...] = ()  # of counts, by rising position; the last one before a position holds
    contrast: Contrast | None = None  # self-contrast decoding: all tokens are computed a second time, as `weak` says

    def __post_init__(self) -> None:
        if self.prefill == self.per_layer:  # one form of one meaning, so that equal budgets compare equal
            object.__setattr__(self, "prefill", ())
        if self.contrast is not None and not self.contrast.beta:
            object.__setattr__(self, "contrast", None)

    @property
    def weak(self) -> "ExpertBudget | None":
        """What the tokens of the second row may use, if there is one: the expert of one rank, weighed as usual."""
        if self.contrast is None:
            return None
        rule = RoutingRule(skip=self.contrast.weak_rank - 1, kept=self.rule.kept)
        return ExpertBudget((1,) * len(self.per_layer), rule=rule)

    @property
    def rows(self) -> int:
        """How many rows of a batch a sequence takes, each with a cache of its own."""
        return 1 if self.contrast is None else 2

    def at(self, position: int, prompt: int) -> ExpertCounts:
        """The counts of the token at `position`, in a sequence whose first `prompt` tokens are its prompt."""
        for first, counts in reversed(self.changes):
            if position >= first:
                return counts
        return self.prefill if self.prefill and position < prompt else self.per_layer

    def runs(self, start: int, end: int, prompt: int) -> tuple[CountRun, ...]:
        """The same of the positions from `start` up to `end`, as runs of equal counts."""
        if self.changes:
            return self._changing_runs(start, end, prompt)
        if not self.prefill or start >= prompt:
            return ((self.per_layer, end - start),)
        if end <= prompt:
            return ((self.prefill, end - start),)
        return (self.prefill, prompt - start), (self.per_layer, end - prompt)

    def _changing_runs(self, start: int, end: int, prompt: int) -> tuple[CountRun, ...]:
        inner = {position for position in (prompt, *dict(self.changes)) if start < position < end}
        runs: list[CountRun] = []
        for first, after in pairwise([start, *sorted(inner), end]):
            counts, tokens = self.at(first, prompt), after - first
            if runs and runs[-1][0] == counts:
                tokens += runs.pop()[1]
            runs.append((counts, tokens))
        return tuple(runs)

    def changed(self, position: int, counts: ExpertCounts) -> "ExpertBudget":
        """The same budget with these counts from `position` on."""
        if position <= 0:
            return replace(self, per_layer=counts, prefill=(), changes=())
        earlier = tuple(change for change in self.changes if change[0] < position)
        return replace(self, changes=(*earlier, (position, counts)))

    @property
    def without_counts(self) -> "ExpertBudget":
        """What a row's keys and values depend on beside the counts of positions."""
        return replace(self, per_layer=(), prefill=(), changes=(), contrast=None)

    def pairs(self, start: int, end: int, prompt: int) -> int:
        """The work of these positions: (token, expert) pairs, or draws, summed over the MoE layers.

        With an adaptive rule the most that it may be; `reuse` may add to it. Both rows are counted where there are two.
        """
        pairs = 0 if self.contrast is None else len(self.per_layer) * (end - start)
        for counts, tokens in self.runs(start, end, prompt):
            pairs += sum(counts) * tokens
        return pairs

    def largest(self, start: int, end: int, prompt: int) -> ExpertCounts:
        """The largest count of each layer among these positions: an upper bound of what one of them costs."""
        first, *others = (counts for counts, _ in self.runs(start, end, prompt))
        return tuple(map(max, first, *others)) if others else first

    def at_most(self, limit: int) -> "ExpertBudget":
        """The same budget with no count above `limit`."""
        changes = tuple((position, _at_most(counts, limit)) for position, counts in self.changes)
        per_layer, prefill = _at_most(self.per_layer, limit), _at_most(self.prefill, limit)
        return replace(self, per_layer=per_layer, prefill=prefill, changes=changes)

    @property
    def counts(self) -> frozenset[int]:
        """Those of all positions and layers."""
        return frozenset((*self.per_layer, *self.prefill)).union(*dict(self.changes).values())

    @property
    def uniform(self) -> int | None:
        """The one count of all positions and layers; None where they differ, or there are no layers."""
        counts = self.counts
        return next(iter(counts)) if len(counts) == 1 else None

    def mean(self, prompt: int, generated: int) -> float:
        """The count to report for so many tokens: the mean over tokens and layers, exact where all are equal.

        With an adaptive rule it says what was allowed; what ran is in `RequestStats.mean_count`.
        """
        runs = self.runs(0, prompt + generated, prompt)
        if len(runs) == 1:
            return _mean(runs[0][0])
        return sum(tokens * _mean(counts) for counts, tokens in runs) / (prompt + generated)


def _at_most(counts: ExpertCounts, limit: int) -> ExpertCounts:
    return tuple(min(limit, count) for count in counts)


def _mean(counts: ExpertCounts) -> float:
    return sum(counts) / len(counts) if counts else 0.0


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
        if not -MOST_MOVED <= value <= MOST_MOVED:
            return f"must be between {-MOST_MOVED:g} and {MOST_MOVED:g}, got {value!r:.64}"
        return ""
