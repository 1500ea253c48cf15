"""∞-MoE: a Gaussian over a continuous expert space; K draws of it mask one wide feed-forward layer (arXiv 2601.17680).

Because the second matrix is linear and the first is shared, the mean of K expert outputs equals one pass under the mean
of the K masks: ŷ = (1/K) Σ_k W2(Act(W1 x) ⊙ mask(z_k)) = W2(Act(W1 x) ⊙ m̄). `masks` computes m̄ from exactly ΣK draws.
Ours, and named in the config: with `block` > 1 (config key mask_block) a group of neighbouring units shares a score;
draws can be fixed points (`model/moe/points.py`), a draw can keep only what no earlier draw of its token kept
(`replacement` false), and the mean mask can be brought to the norm of its draws (`aggregate` "norm").
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import devices
from model.activation import activate
from model.moe.base import RoutedPairs, sort_pairs, token_ranks
from model.moe.points import fixed_points
from model.registry import LayerModule, module_for
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Infinity
from model.step import LayerStep


@cache
def _points(count: int, latent_dim: int, device: torch.device) -> Tensor:
    """The fixed points on a device. Cached, because every layer of every step reads them."""
    return fixed_points(count, latent_dim).to(device, non_blocking=True)


class InfinityMixture(LayerModule):
    """Router [2Z, D] (mean, then raw spread), scores W_z [groups, Z], up W1 [F, D], down W2 [D, F]."""

    def __init__(self, width: int, config: Infinity) -> None:
        super().__init__()
        self.config = config
        self.router = nn.Parameter(torch.empty(2 * config.latent_dim, width))
        self.scores = nn.Parameter(torch.empty(config.blocks, config.latent_dim))
        self.up = nn.Parameter(torch.empty(config.units, width))
        self.down = nn.Parameter(torch.empty(width, config.units))
        self.execute: Callable[[Tensor, Tensor], Tensor] | None = None  # another way than `run_masked`

    def forward(self, x_TD: Tensor, step: LayerStep) -> Tensor:
        if step.budget.reroutes:
            raise ValueError("the draws of an ∞-MoE have no router weights that a routing rule could change")
        mask_TE = self.masks(x_TD, step)
        if step.observer is not None:
            draws, load_E = step.budget.pairs, (mask_TE != 0).sum(0)
            step.observer.routed(step.moe_layer, draws, load_E, None)
            if step.routes:
                step.observer.routes(step.moe_layer, kept_groups(mask_TE))
        return (self.execute or self.run_masked)(x_TD, mask_TE)

    def gaussian(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of p(z | x), each [T, Z], float32 (eq. 5)."""
        mean_TZ, raw_TZ = F.linear(x_TD, self.router).float().chunk(2, dim=-1)
        linked_TZ = raw_TZ.exp() if self.config.sigma_link == "exp" else F.softplus(raw_TZ)
        return mean_TZ, linked_TZ + self.config.sigma_min

    def masks(self, x_TD: Tensor, step: LayerStep) -> Tensor:
        """m̄ [T, groups], float32: the mean over a token's draws of its top-share masks, raw scores kept (eq. 6)."""
        mean_TZ, sigma_TZ = self.gaussian(x_TD)
        token_R, sample_R = token_ranks(step.budget.counts_T, step.budget.pairs)
        z_RZ = mean_TZ[token_R] + sigma_TZ[token_R] * self.noise(token_R, sample_R, step)
        # Which groups are kept is decided in float32, also in training.
        with torch.autocast(x_TD.device.type, enabled=False):
            score_RE = F.linear(z_RZ, self.scores.float())
        return mean_masks(score_RE, step.budget.counts_T, step.budget.k_max, self.config)

    def noise(self, token_R: Tensor, sample_R: Tensor, step: LayerStep) -> Tensor:
        """ε_RZ of each (token, sample). Antithetic draws come in pairs: an odd sample mirrors the one before it."""
        if self.config.draws == "points":
            return _points(self.config.maximum, self.config.latent_dim, sample_R.device)[sample_R]
        if self.config.draws == "independent":
            return step.noise(token_R, sample_R, self.config.latent_dim)
        sign_R = 1 - 2 * (sample_R % 2)
        return step.noise(token_R, sample_R // 2, self.config.latent_dim) * sign_R[:, None]

    def run_masked(self, x_TD: Tensor, mask_TE: Tensor) -> Tensor:
        """One masked dense pass for all tokens and counts (eq. 7): all the work of the wide layer, in few large
        products."""
        h_TF = activate(F.linear(x_TD, self.up), self.config.activation)
        h_TEg = h_TF.unflatten(-1, (self.config.blocks, self.config.block))
        masked_TEg = h_TEg * mask_TE[..., None].to(h_TF.dtype)
        return F.linear(masked_TEg.flatten(1), self.down)

    def pairs(self, mask_TE: Tensor) -> RoutedPairs:
        """The same work as a ragged list: a kept group is an expert of `block` units, its mean score the weight."""
        token_R, expert_R = mask_TE.nonzero(as_tuple=True)
        return sort_pairs(token_R, expert_R, mask_TE[token_R, expert_R], self.config.blocks)

    def run_pairs(self, x_TD: Tensor, pairs: RoutedPairs) -> Tensor:
        """Compute only the kept groups: the reference for a native ragged kernel, with `run_masked`'s values."""
        y_TD = torch.zeros_like(x_TD)
        start, size = 0, self.config.block
        for block, end in enumerate(pairs.ends_E.tolist()):
            if end > start:
                units = slice(block * size, (block + 1) * size)
                token_r = pairs.token_R[start:end]
                up_rg = F.linear(x_TD[token_r], self.up[units])
                h_rg = activate(up_rg, self.config.activation)
                weighted_rg = h_rg * pairs.weight_R[start:end, None].to(h_rg.dtype)
                y_TD.index_add_(0, token_r, F.linear(weighted_rg, self.down[:, units]))
                start = end
        return y_TD


@module_for.register
def _(shape: Infinity, decoder: DecoderConfig) -> InfinityMixture:
    return InfinityMixture(decoder.width, shape)


def kept_groups(mask_TE: Tensor) -> Tensor:
    """The groups that each token keeps, in rising order, then -1; int32."""
    kept_TE = mask_TE != 0
    group_TE = kept_TE.sort(dim=-1, descending=True, stable=True).indices
    return group_TE.where(kept_TE.gather(-1, group_TE), -1).int()


def mean_masks(score_RE: Tensor, counts_T: Tensor, k_max: int, config: Infinity) -> Tensor:
    """m̄ [T, groups]: the mean of what each draw of a token keeps. Its rows lie together, in the order of the draws."""
    if config.replacement:
        mask_RE = keep_top(score_RE, config.kept)
    elif devices.readable(score_RE):
        mask_RE = keep_new(score_RE, counts_T, k_max, config.kept)
    else:
        mask_RE = keep_new_padded(score_RE, counts_T, k_max, config.kept)
    token_R, _ = token_ranks(counts_T, len(score_RE))
    sum_TE = mask_RE.new_zeros(len(counts_T), config.blocks).index_add(0, token_R, mask_RE)
    mean_TE = sum_TE / counts_T[:, None]
    if config.aggregate == "mean":
        return mean_TE
    square_R1 = mask_RE.square().sum(-1, keepdim=True)
    square_T1 = square_R1.new_zeros(len(counts_T), 1).index_add(0, token_R, square_R1)
    return restore_norm(mean_TE, square_T1 / counts_T[:, None])


def restore_norm(mean_TE: Tensor, square_T1: Tensor) -> Tensor:
    """The mean masks, scaled to the root of the mean square norm of their draws, `square_T1`.

    Masks that do not overlap shrink when they are averaged. The small numbers are those of the training.
    """
    norm_T1 = (mean_TE.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    return mean_TE * ((square_T1 + 1e-12).sqrt() / norm_T1)


def keep_new(scores_RE: Tensor, counts_T: Tensor, k_max: int, kept: int) -> Tensor:
    """As `keep_top`, without replacement: a token's draw keeps the best groups that none of its earlier draws kept."""
    first_T = counts_T.cumsum(0) - counts_T  # each token's first row
    mask_RE = torch.zeros_like(scores_RE)
    taken_TE = torch.zeros(len(counts_T), scores_RE.shape[1], dtype=torch.bool, device=scores_RE.device)
    for draw in range(k_max):
        token_t = (counts_T > draw).nonzero(as_tuple=True)[0]
        score_tE, old_tE = scores_RE[first_T[token_t] + draw], taken_TE[token_t]
        open_tE = score_tE.masked_fill(old_tE, -torch.inf)
        threshold_t1 = open_tE.topk(kept, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        new_tE = (open_tE >= threshold_t1) & ~old_tE
        mask_RE[first_T[token_t] + draw] = torch.where(new_tE, score_tE, 0)
        taken_TE[token_t] = old_tE | new_tE
    return mask_RE


def keep_new_padded(scores_RE: Tensor, counts_T: Tensor, k_max: int, kept: int) -> Tensor:
    """As `keep_new`, with as many draws of every token: no size follows from the counts. What a token draws beyond its
    count is not returned."""
    first_T = counts_T.cumsum(0) - counts_T
    taken_TE = torch.zeros(len(counts_T), scores_RE.shape[1], dtype=torch.bool, device=scores_RE.device)
    masks = []
    for draw in range(k_max):
        row_T = (first_T + draw).clamp(max=len(scores_RE) - 1)
        score_TE = scores_RE[row_T]
        open_TE = score_TE.masked_fill(taken_TE, -torch.inf)
        threshold_T1 = open_TE.topk(kept, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        new_TE = (open_TE >= threshold_T1) & ~taken_TE
        masks.append(torch.where(new_TE, score_TE, 0))
        taken_TE = taken_TE | new_TE
    token_R, draw_R = token_ranks(counts_T, len(scores_RE))
    return torch.stack(masks)[draw_R, token_R]


def keep_top(scores_RE: Tensor, kept: int) -> Tensor:
    """Keep the scores that reach the row's `kept`-th largest value, by value and not by magnitude; zero the rest."""
    threshold_R1 = scores_RE.topk(kept, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    return torch.where(scores_RE >= threshold_R1, scores_RE, 0)
