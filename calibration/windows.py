"""Windows of text as batches of whole sequences, each with a budget of its own. It depends on tokens, not on files."""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.batch import Batch, BudgetRows
from model.budget import FAMILY_RULE, ExpertBudget

SEED = 0  # of the noise that a family draws: the same for all windows, as in `calibration/scoring.py`


def window_batch(ids_BS: Tensor, budgets: Sequence[ExpertBudget]) -> Batch:
    """Windows [B, S] as a batch with logits for every token; window b runs with `budgets[b]`."""
    windows, length = ids_BS.shape
    return Batch(
        ids_T=ids_BS.flatten(),
        positions_T=torch.arange(length).repeat(windows),
        seeds_T=torch.full((windows * length,), SEED),
        budget=_budget_rows(budgets, length),
        rows_B=torch.arange(windows * length),
    )


def _budget_rows(budgets: Sequence[ExpertBudget], length: int) -> BudgetRows:
    counts_BL = torch.tensor([budget.per_layer for budget in budgets])
    counts_LT = counts_BL.T.repeat_interleave(length, dim=1).contiguous()
    pairs_L = tuple(counts_LT.sum(1).tolist())
    rules = tuple(dict.fromkeys(budget.rule for budget in budgets))
    if rules == (FAMILY_RULE,):
        return BudgetRows(counts_LT, int(counts_LT.amax()), pairs_L)
    rule_B = torch.tensor([rules.index(budget.rule) for budget in budgets])
    return BudgetRows(counts_LT, int(counts_LT.amax()), pairs_L, rules, rule_B.repeat_interleave(length))
