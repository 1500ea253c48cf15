"""Routers of sparse mixtures: from logits to the first K of each token's experts and their weights.

Experts are ranked once, ties to the lower index (here a stable sort; the kernels make K selections, `route` in
csrc/topk.h), so that the choice of K is a prefix of the choice of K + 1.
"""

import torch
from torch import Tensor

from model.shapes.mixtures import Router


def choose(logits_TE: Tensor, allowed_TK: Tensor, router: Router, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
    """Experts [T, K], best first, and their weights [T, K], float32, normalised over the allowed ranks.

    `allowed_TK` says which ranks a token may use; the weights of others mean nothing.
    """
    if router.score == "sparse_mixer":
        return _sparse_mixer(logits_TE, allowed_TK.shape[1], router.jitter)
    most = allowed_TK.shape[1]
    scores_TE = scores(logits_TE, router)
    ranked_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if router.score == "sigmoid" and bias_E is None and router.groups == 1:
        ranked_TE = logits_TE  # the same order, but large ones do not become equal
    if router.groups > 1:
        ranked_TE = _inside_groups(ranked_TE, router)
    expert_TK = ranked_TE.sort(dim=-1, descending=True, stable=True).indices[:, :most]
    weight_TK = scores_TE.gather(-1, expert_TK)
    if router.normalise:
        # A running sum: a token's divisor does not depend on how many ranks its neighbours may use.
        sum_T1 = (weight_TK * allowed_TK).cumsum(-1)[:, -1:]
        weight_TK = weight_TK / (sum_T1.clamp(min=router.eps) if router.clamp_sum else sum_T1 + router.eps)
    return expert_TK, weight_TK * router.scale


def scores(logits_TE: Tensor, router: Router) -> Tensor:
    """What an expert is worth to each token, float32."""
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
    """Phi-3.5-MoE's inference rule: the best expert weighs its softmax share among those not far below it; then the
    same again without it."""
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
