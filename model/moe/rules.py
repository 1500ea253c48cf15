"""Applies routing rules (`RoutingRule`) other than the family's: which of its ranked experts a token runs, and their
weights.

Every token has its own rule. A token with the family's rule gets the same bits as without this file. Plain torch only.
Not here: how experts are ranked (see `model/moe/router.py`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.batch import LayerBudget
from model.budget import RoutingRule
from model.devices import tensor_on
from model.moe.base import Choice, normalised, running_sum
from model.shapes.mixtures import Router

TRAINED, RAW, KEPT = 0, -1, -2  # normalisers as numbers; n > 0 stands for itself
_NUMBERS = {"trained": TRAINED, "raw": RAW, "kept": KEPT}


@dataclass(frozen=True, slots=True)
class _TokenRules:
    """The rule of each token, as columns."""

    count_T1: Tensor
    normaliser_T1: Tensor
    threshold_T1: Tensor
    top_p_T1: Tensor
    reuse_T1: Tensor
    skip_T1: Tensor

    @classmethod
    def of(cls, budget: LayerBudget) -> "_TokenRules":
        rules, rule_T = budget.rules, budget.rule_T
        assert rule_T is not None

        def column(values: list[float] | list[int]) -> Tensor:
            return tensor_on(values, rule_T.device)[rule_T, None]

        return cls(
            budget.counts_T[:, None],
            column([number(rule) for rule in rules]),
            column([rule.threshold for rule in rules]),
            column([rule.top_p for rule in rules]),
            column([rule.reuse for rule in rules]),
            column([rule.skip for rule in rules]),
        )


def number(rule: RoutingRule) -> int:
    """The rule's normaliser as a number (TRAINED, RAW, KEPT, or n > 0)."""
    return rule.normaliser if isinstance(rule.normaliser, int) else _NUMBERS[rule.normaliser]


def choose_by_rules(scores_TE: Tensor, ranked_TE: Tensor, router: Router, budget: LayerBudget, trained: int) -> Choice:
    """As `choose` of the router. Experts are ranked by `ranked_TE`; one at minus infinity is never chosen."""
    rules = _TokenRules.of(budget)
    best_TE = ranked_TE.sort(dim=-1, descending=True, stable=True)
    expert_TE = best_TE.indices
    score_TE = scores_TE.gather(-1, expert_TE)
    runs_TE = _own(score_TE, rules, router)
    if any(rule.reuse for rule in budget.rules):
        eligible_TE = _run_anyway(expert_TE, runs_TE) & ~runs_TE & (best_TE.values > -torch.inf)
        eligible_TE = eligible_TE & (_rank(expert_TE) >= rules.skip_T1)
        runs_TE = runs_TE | eligible_TE & (eligible_TE.cumsum(-1) <= rules.reuse_T1)
    weight_TE = _weights(score_TE, runs_TE, rules, router, trained)
    return Choice(expert_TE, weight_TE * router.scale, runs_TE)


def _own(score_TE: Tensor, rules: _TokenRules, router: Router) -> Tensor:
    """Which ranks a token runs by its own scores: its count, but only up to the first rank that `threshold` or `top_p`
    excludes."""
    rank_E = _rank(score_TE)
    skipped_TE = rank_E < rules.skip_T1
    sums_TE = score_TE.masked_fill(skipped_TE, 0).cumsum(-1)
    all_T1 = 1.0 if router.score == "softmax" else score_TE.cumsum(-1)[:, -1:]
    before_TE = torch.nn.functional.pad(sums_TE[:, :-1], (1, 0))  # the scores of better ranks together
    enough_TE = (rules.top_p_T1 > 0) & (before_TE >= rules.top_p_T1 * all_T1)
    weak_TE = score_TE < rules.threshold_T1 * score_TE.gather(-1, rules.skip_T1)
    stopped_TE = ((enough_TE | weak_TE) & (rank_E > rules.skip_T1)).cumsum(-1) > 0
    return (rank_E < rules.skip_T1 + rules.count_T1) & ~skipped_TE & ~stopped_TE


def _rank(score_TE: Tensor) -> Tensor:
    return torch.arange(score_TE.shape[1], device=score_TE.device)


def _run_anyway(expert_TE: Tensor, runs_TE: Tensor) -> Tensor:
    """Bool [T, E], by rank: whether some token of the batch runs the expert at this rank."""
    by_expert_TE = torch.zeros_like(runs_TE).scatter(-1, expert_TE, runs_TE)
    return by_expert_TE.any(0)[expert_TE]


def _weights(score_TE: Tensor, runs_TE: Tensor, rules: _TokenRules, router: Router, trained: int) -> Tensor:
    """Weights of all ranks; those of ranks that do not run are undefined."""
    own_T1 = running_sum(score_TE * runs_TE)
    nth_T1 = rules.normaliser_T1.clamp(min=1) - 1
    best_n_T1 = score_TE.cumsum(-1).gather(-1, nth_T1)
    if router.normalise:
        family_TE = kept_TE = normalised(score_TE, own_T1, router)
        best_n_TE = normalised(score_TE, best_n_T1, router)
    else:
        mass_T1 = running_sum(score_TE[:, :trained])
        family_TE = score_TE
        kept_TE, best_n_TE = _share(score_TE, mass_T1, own_T1), _share(score_TE, mass_T1, best_n_T1)
    weight_TE = torch.where(rules.normaliser_T1 == KEPT, kept_TE, best_n_TE)
    weight_TE = torch.where(rules.normaliser_T1 == RAW, score_TE, weight_TE)
    as_trained_T1 = (rules.normaliser_T1 == TRAINED) | (rules.count_T1 >= trained)
    return torch.where(as_trained_T1, family_TE, weight_TE)


def _share(score_TE: Tensor, mass_T1: Tensor, sum_T1: Tensor) -> Tensor:
    """score · mass / sum, where `mass` is the sum at the trained count; scores that are all zero stay zero."""
    return score_TE * (mass_T1 / sum_T1.clamp(min=torch.finfo(sum_T1.dtype).tiny))
