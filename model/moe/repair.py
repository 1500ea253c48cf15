"""Repair: brings a mixture's output at a small count to the mean and spread that it has at the trained count.

Statistics per layer, count and dimension; `weights/repair.py` reads them. Not here: how they are measured.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.batch import LayerBudget
from model.devices import tensor_on


@dataclass(frozen=True, slots=True)
class RepairTables:
    """Of one MoE layer, float32; row = count. At the trained count scale is 1 and shift is 0."""

    scale_KD: Tensor
    shift_KD: Tensor


def repaired(y_TD: Tensor, budget: LayerBudget, tables: RepairTables | None) -> Tensor:
    """The output of a mixture, where a token's rule has repair by the row of its count.

    Raises:
        ValueError: a token's rule has repair, and there are no statistics.
    """
    if not any(rule.repair for rule in budget.rules):
        return y_TD
    if tables is None:
        raise ValueError("a routing rule asks for repair, and no statistics were loaded")
    wanted_T = tensor_on([rule.repair for rule in budget.rules], y_TD.device)[budget.rule_T]
    repaired_TD = y_TD.float() * tables.scale_KD[budget.counts_T] + tables.shift_KD[budget.counts_T]
    return torch.where(wanted_T[:, None], repaired_TD.to(y_TD.dtype), y_TD)
