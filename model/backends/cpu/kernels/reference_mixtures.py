"""What the ops of mixtures compute, in plain torch and float64: routing, draws, masks, and both mixtures' blocks.

As `reference`, whose norms, weights and experts these are made of.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from model.backends.cpu.kernels.params import NO_REPAIR, RepairParams
from model.backends.cpu.kernels.reference import Experts, Norm, Weight, experts
from model.batch import LayerBudget
from model.moe.base import RoutedPairs, ranks
from model.moe.infinity import InfinityMixture, keep_top
from model.moe.router import choose
from model.shapes.mixtures import Infinity, Router
from model.step import LayerStep


def route(
    logits_TE: Tensor, budget: LayerBudget, router: Router, bias_E: Tensor | None = None, trained: int = 1
) -> RoutedPairs:
    """Each token's best experts and their weights, as the mixture itself chooses them."""
    if bias_E is not None:
        bias_E = bias_E.double()
    return choose(logits_TE.double(), budget, router, bias_E, trained).pairs(logits_TE.shape[1])


def topk_block(
    x_TD: Tensor,
    budget: LayerBudget,
    norm: Norm,
    weight: Weight,
    layer: Experts,
    router: Router,
    residual_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """x + residual_scale · experts(norm(x)), and each expert's pairs."""
    h_TD = norm(x_TD)
    pairs = route(weight(h_TD).float(), budget, router)
    return x_TD + residual_scale * experts(h_TD, pairs, layer), pairs.load_E


def repaired(y_TD: Tensor, budget: LayerBudget, repair: RepairParams) -> Tensor:
    """y * scale + shift of each token's count, where its rule has repair."""
    if budget.rule_T is None or repair.scale is None or repair.shift is None:
        return y_TD
    repair_T1 = torch.tensor([rule.repair for rule in budget.rules])[budget.rule_T][:, None]
    scale_TD, shift_TD = repair.scale[budget.counts_T].double(), repair.shift[budget.counts_T].double()
    return torch.where(repair_T1, y_TD * scale_TD + shift_TD, y_TD)


def draw(gaussian_TZ: Tensor, use: LayerStep, config: Infinity) -> Tensor:
    """z_RZ = mean + spread · ε for each token's draws in order; `gaussian` is the means, then the raw spreads."""
    mean_TZ, raw_TZ = gaussian_TZ.double().chunk(2, dim=-1)
    sigma_TZ = (raw_TZ.exp() if config.sigma_link == "exp" else F.softplus(raw_TZ)) + config.sigma_min
    token_R, sample_R = ranks(use.budget).nonzero(as_tuple=True)
    noise_RZ = InfinityMixture(1, config).noise(token_R, sample_R, use)
    return mean_TZ[token_R] + sigma_TZ[token_R] * noise_RZ


def masks(scores_RE: Tensor, counts_T: Tensor, kept: int, replacement: bool = True, keep_norm: bool = False) -> Tensor:
    """The mean over each token's draws of the scores that each keeps, [T, scores]."""
    if not replacement or keep_norm:
        return _masks_by_draw(scores_RE, counts_T, kept, replacement, keep_norm)
    token_R = torch.arange(len(counts_T)).repeat_interleave(counts_T)
    sum_TE = scores_RE.new_zeros(len(counts_T), scores_RE.shape[1], dtype=torch.float64)
    return sum_TE.index_add(0, token_R, keep_top(scores_RE, kept).double()) / counts_T[:, None]


def _masks_by_draw(scores_RE: Tensor, counts_T: Tensor, kept: int, replacement: bool, keep_norm: bool) -> Tensor:
    """The same, draw by draw in float64: without replacement, or with the norm of the draws."""
    mean_TE = scores_RE.new_zeros(len(counts_T), scores_RE.shape[1], dtype=torch.float64)
    for token, rows_KE in enumerate(scores_RE.split(counts_T.tolist())):
        taken_E = torch.zeros(scores_RE.shape[1], dtype=torch.bool)
        squares = 0.0
        for row_E in rows_KE:
            open_E = row_E if replacement else row_E.masked_fill(taken_E, -torch.inf)
            least = open_E.topk(kept).values.amin()
            keep_E = (open_E >= least) & (open_E > -torch.inf)
            taken_E |= keep_E
            kept_E = torch.where(keep_E, row_E, 0).double()
            mean_TE[token] += kept_E / len(rows_KE)
            squares += float(kept_E.square().sum()) / len(rows_KE)
        if keep_norm:
            own = float(mean_TE[token].square().sum())
            mean_TE[token] *= math.sqrt(squares + 1e-12) / math.sqrt(own + 1e-6)
    return mean_TE


def infinity_block(
    x_TD: Tensor,
    use: LayerStep,
    config: Infinity,
    norm: Norm,
    router: Weight,
    scores: Weight,
    layer: Experts,
    repair: RepairParams = NO_REPAIR,
    residual_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """x + residual_scale · the masked feed-forward layer of norm(x), repaired, and each score's tokens. `layer` has an
    expert per run of units."""
    h_TD = norm(x_TD)
    z_RZ = draw(router(h_TD).float(), use, config)
    score_RE = scores(z_RZ.float()).float()
    mask_TE = masks(score_RE, use.budget.counts_T, config.kept, config.replacement, config.aggregate == "norm")
    runs, units = layer.up.values_ENK.shape[:2]
    mask_TF = mask_TE.repeat_interleave(config.block, dim=1)
    mask_TF = F.pad(mask_TF, (0, runs * units - config.units))
    y_TD = torch.zeros_like(x_TD, dtype=torch.float64)
    for run, mask_Tu in enumerate(mask_TF.split(units, dim=1)):
        y_TD = y_TD + layer.out(layer.hidden(h_TD, run) * mask_Tu, run)
    return x_TD + residual_scale * repaired(y_TD, use.budget, repair), (mask_TE != 0).sum(0)
