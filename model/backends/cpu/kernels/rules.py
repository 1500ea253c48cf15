"""Routing rules as the kernels read them: one row of numbers each, and the row of each token.

The other side is `StepRules` in csrc/step_rules.h. What the numbers do is in csrc/rules.h.
"""

from dataclasses import fields
from functools import lru_cache

import torch
from torch import Tensor

from model.batch import BudgetRows, LayerBudget
from model.budget import FAMILY_RULE, OWN_FIELDS, RoutingRule

NORMALISERS = {"kept": -2, "trained": -1, "raw": 0}  # as in csrc/mixtures.h; a number stands for itself
NO_SETS = torch.empty(0, 0, dtype=torch.uint8)
NO_RULES = (torch.empty(0, 6, dtype=torch.float64), torch.empty(0, dtype=torch.int64), NO_SETS)


def rule_arguments(budget: BudgetRows | LayerBudget) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct rules [R, 6] of a step, which of them each token has [T], and which experts each rule lets run
    [R, N], layer after layer; empty where all tokens have their family's, or every rule lets all run."""
    if budget.rule_T is None:
        return NO_RULES
    layers = slice(None) if isinstance(budget, BudgetRows) else slice(budget.moe_layer, budget.moe_layer + 1)
    kept = tuple("".join(rule.kept[layers]) for rule in budget.rules)
    return _rows(budget.rules), budget.rule_T, _kept(kept) if any(kept) else NO_SETS


@lru_cache(maxsize=64)  # a step's sets
def _kept(kept: tuple[str, ...]) -> Tensor:
    everything = "1" * max(map(len, kept))
    return torch.tensor([[int(one) for one in experts or everything] for experts in kept], dtype=torch.uint8)


@lru_cache(maxsize=256)  # requests choose their rules
def _rows(rules: tuple[RoutingRule, ...]) -> Tensor:
    return torch.tensor([_row(rule) for rule in rules], dtype=torch.float64)


def _row(rule: RoutingRule) -> list[float]:
    """All numbers in the order of their fields, without those that no kind with kernels takes: one that the kernels do
    not know makes a row that they refuse."""
    for name in OWN_FIELDS:
        if getattr(rule, name) != getattr(FAMILY_RULE, name):
            raise ValueError(f"the kernels know no {name}, got {getattr(rule, name)!r:.64}")
    values = [getattr(rule, field.name) for field in fields(rule) if field.name not in (*OWN_FIELDS, "kept")]
    return [NORMALISERS[value] if isinstance(value, str) else value for value in values]
