"""What a request may spend on experts: its counts, by position and layer, and its routing rule.

Standard library only: the HTTP process, the scheduler and the model all read these values.
Not here: which of them a model can run (`model/expert_range.py`), and how a count becomes work (`model/moe/`).
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from model.contrast import Contrast

MAX_MOVED = 100.0  # of a router's logits, in either direction
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
