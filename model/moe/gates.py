"""Routers whose experts have a gate each: a token runs those whose gates are open, at most as many as its count.

DynMoE (arXiv 2405.14297), "top_any": with s = sigmoid(t · cos(x, w_e)), expert e runs where s > sigmoid(t · g_e), with
weight 1; where no gate is open, the expert with the highest s runs. ReMoE (arXiv 2412.14711), "relu": the gate is
ReLU(x · w_e), and the weight is its value; where all are closed, nothing runs.

Ours: the count as an upper bound, experts by falling score; and `gate_offset` of a request, which is added to the
logits (for "relu" also in the weight, so that an expert that it opens weighs something).
"""

import torch
from torch import Tensor

from model.batch import LayerBudget
from model.moe.base import Choice, ranks, rule_offsets
from model.shapes.mixtures import Router


def choose_open(logits_TE: Tensor, budget: LayerBudget, router: Router, closes_E: Tensor | None) -> Choice:
    """The open ones of each token's experts, best first. A gate opens above 0; `closes_E` is added for that alone."""
    if budget.ranks:
        raise ValueError("experts with gates run no routing rule but an offset of the gates")
    offset_T1 = rule_offsets(budget, "gate_offset")
    gate_TE = logits_TE if offset_T1 is None else logits_TE + offset_T1
    open_TE = gate_TE > 0 if closes_E is None else gate_TE + closes_E > 0
    order_TE = logits_TE.sort(dim=-1, descending=True, stable=True).indices
    open_TE = open_TE.gather(-1, order_TE)
    if router.score == "top_any":
        open_TE[:, 0] |= ~open_TE.any(-1)
    first_TK = open_TE.sort(dim=-1, descending=True, stable=True).indices[:, : budget.k_max]
    expert_TK = order_TE.gather(-1, first_TK)
    weight_TK = gate_TE.gather(-1, expert_TK).relu() if router.score == "relu" else torch.ones_like(first_TK).float()
    return Choice(expert_TK, weight_TK * router.scale, open_TE.gather(-1, first_TK) & ranks(budget))
