"""Self-contrast decoding: the logits of a sequence's two rows become those that it is sampled from.

The sampler sees one row. Not here: what a request asks for (`model/contrast.py`), and how a chunk becomes two rows of a
batch (`engine/plan.py`).
"""

import math

import torch
from torch import Tensor

from engine.plan import Plan
from model.contrast import Contrast
from model.devices import tensor_on

# Added to the logits of tokens that are left out. Finite, so that logits stay what samplers and JSON take; at the
# highest temperature still a probability of zero; and where a grammar allows no other token, the strong row decides.
LEFT_OUT = -1e5


def joined(logits_RV: Tensor, plan: Plan) -> Tensor:
    """The logits that a plan asks for, from those of `rows_of(plan)`: of two rows of a sequence, the contrasted ones.
    Rows to sample from come first; those that score prompts stay as they are."""
    own: list[int] = []  # of the given rows, those that are kept
    strong: list[int] = []  # of the kept rows, those that are contrasted
    weak: list[int] = []  # of the given rows, what they are contrasted with
    asked: list[Contrast] = []
    row = 0
    for chunk in plan:
        count = chunk.samples * (1 + len(chunk.drafts))
        contrast = chunk.sequence.request.budget.contrast
        if contrast is not None:
            strong += range(len(own), len(own) + count)
            weak += range(row + count, row + 2 * count)
            asked += [contrast] * count
        own += range(row, row + count)
        row += count * chunk.sequence.row_count
    if not asked:
        return logits_RV
    own += range(row, len(logits_RV))
    device = logits_RV.device
    strong_P, weak_P = tensor_on(strong, device), tensor_on(weak, device)
    kept_RV = logits_RV.index_select(0, tensor_on(own, device)).float()
    weak_PV = logits_RV.index_select(0, weak_P).float()
    beta_P = tensor_on([contrast.beta for contrast in asked], device)
    log_alpha_P = tensor_on([math.log(contrast.alpha) for contrast in asked], device)
    made_PV = contrasted(kept_RV.index_select(0, strong_P), weak_PV, beta_P, log_alpha_P)
    return kept_RV.index_copy(0, strong_P, made_PV)


def contrasted(strong_PV: Tensor, weak_PV: Tensor, beta_P: Tensor, log_alpha_P: Tensor) -> Tensor:
    """(1 + β) · strong - β · weak of the tokens whose strong logit is at least log α below the best one; the strong
    logits and `LEFT_OUT` of others. A row is not a number where its weak logits are not finite."""
    beta_P1, log_alpha_P1 = beta_P[:, None], log_alpha_P[:, None]
    valid_PV = strong_PV >= strong_PV.amax(-1, keepdim=True) + log_alpha_P1
    score_PV = (1 + beta_P1) * strong_PV - beta_P1 * weak_PV
    found_PV = torch.where(valid_PV, score_PV, strong_PV + LEFT_OUT)
    return found_PV.where(torch.isfinite(weak_PV).all(-1, keepdim=True), torch.nan)
