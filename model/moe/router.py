"""Routers of sparse mixtures: from logits to the first K of each token's experts and their weights.

Experts are ranked once, ties to the lower index (here a stable sort; the kernels make K selections, `route` in
csrc/topk.h), so that the choice of K is a prefix of the choice of K + 1. What requests may change of a family's rule is
in `model/moe/rules.py`.
"""

import torch
from torch import Tensor

from model.batch import LayerBudget
from model.moe.base import Choice, allowed, normalised, ranks, running_sum
from model.moe.gates import choose_open
from model.moe.rules import choose_by_rules
from model.shapes.mixtures import GATES, Router


def choose(logits_TE: Tensor, budget: LayerBudget, router: Router, bias_E: Tensor | None, trained: int) -> Choice:
    """Experts of each token, best first, and their weights, float32, normalised over those that run."""
    allowed_TE = allowed(budget)
    if allowed_TE is not None:
        logits_TE = logits_TE.masked_fill(~allowed_TE, -torch.inf)
    if router.score == "sparse_mixer":
        if budget.ranks:
            raise ValueError("the sparse mixer runs no routing rule but its own")
        return Choice(*_sparse_mixer(logits_TE, budget.k_max, router.jitter), ranks(budget))
    if router.score in GATES:
        return choose_open(logits_TE, budget, router, bias_E)
    scores_TE = scores(logits_TE, router)
    ranked_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if router.score == "sigmoid" and bias_E is None and router.groups == 1:
        ranked_TE = logits_TE  # the same order, but large ones do not become equal
    if router.groups > 1:
        ranked_TE = _inside_groups(ranked_TE, router)
    if allowed_TE is not None:  # also with a bias, and before those whose probability is zero
        ranked_TE = ranked_TE.masked_fill(~allowed_TE, -torch.inf)
    if budget.ranks:
        return choose_by_rules(scores_TE, ranked_TE, router, budget, trained)
    runs_TK = ranks(budget)
    expert_TK = ranked_TE.sort(dim=-1, descending=True, stable=True).indices[:, : budget.k_max]
    weight_TK = scores_TE.gather(-1, expert_TK)
    if router.normalise:
        weight_TK = normalised(weight_TK, running_sum(weight_TK * runs_TK), router)
    return Choice(expert_TK, weight_TK * router.scale, runs_TK)


def scores(logits_TE: Tensor, router: Router) -> Tensor:
    """The score of each expert for each token, [T, E], float32."""
    if router.score == "relu":
        return logits_TE.relu()
    if router.score == "top_any":
        return logits_TE.sigmoid()
    return logits_TE.sigmoid() if router.score == "sigmoid" else logits_TE.softmax(-1)


def _inside_groups(ranked_TE: Tensor, router: Router) -> Tensor:
    """Scores of the experts in a token's best groups; those of others are -inf (DeepSeek-V2 §2.2.2, V3 §2.1.2)."""
    ranked_TGe = ranked_TE.unflatten(-1, (router.groups, -1))
    best = 1 if router.group_score == "max" else 2
    group_TG = ranked_TGe.topk(best, dim=-1).values.sum(-1)
    best_Tg = group_TG.sort(dim=-1, descending=True, stable=True).indices[:, : router.kept_groups]
    kept_TG = torch.zeros_like(group_TG, dtype=torch.bool).scatter(-1, best_Tg, True)
    return ranked_TGe.masked_fill(~kept_TG[..., None], -torch.inf).flatten(1)


def _sparse_mixer(logits_TE: Tensor, most: int, jitter: float) -> tuple[Tensor, Tensor]:
    """Phi-3.5-MoE's inference rule: the best expert's weight is its softmax probability among the experts not far below
    it; then the same again without that expert."""
    experts, weights = [], []
    left_TE = logits_TE
    for _ in range(most):
        best_T1, expert_T1 = left_TE.max(dim=-1, keepdim=True)
        far_TE = (best_T1 - logits_TE) / logits_TE.abs().clamp(min=best_T1) > 2 * jitter
        share_TE = left_TE.masked_fill(far_TE, -torch.inf).softmax(-1)
        weights.append(share_TE.gather(-1, expert_T1))
        experts.append(expert_T1)
        left_TE = left_TE.scatter(-1, expert_T1, -torch.inf)
    return torch.cat(experts, dim=-1), torch.cat(weights, dim=-1)
