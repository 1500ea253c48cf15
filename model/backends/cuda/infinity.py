"""One ∞-MoE on a GPU: the Gaussian, its draws, their mean mask, and the two products under it; eight launches.

Nothing is read back: which units are kept, and how many, stays on the device. Not here: the residual and the next norm,
which are `residual_norm`'s.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.backends.cuda.kernels.draws import draw, noise_table
from model.backends.cuda.kernels.gemm import gemm
from model.backends.cuda.kernels.grouped import kept_steps, masked_down, masked_up
from model.backends.cuda.kernels.masks import keep
from model.backends.cuda.kernels.operands import Weight
from model.backends.cuda.layer import row_tile
from model.moe.infinity import InfinityMixture
from model.shapes.mixtures import Infinity
from model.step import LayerStep


@dataclass(frozen=True, slots=True)
class InfinityLayer:
    """The weights of an ∞-MoE as the kernels read them; the parameters of the module it was made of."""

    shape: Infinity
    gaussian: Weight
    scores: Weight  # float32: which groups win is decided in it
    up_FD: Tensor
    down_DF: Tensor
    table: Tensor

    def __call__(self, x_TD: Tensor, step: LayerStep) -> Tensor:
        """The output [T, D], float32."""
        return self.run_masked(x_TD, self.masks(x_TD, step))

    def masks(self, x_TD: Tensor, step: LayerStep) -> Tensor:
        """The mean mask of each token [T, groups], float32; 0 where no draw keeps a group."""
        shape, (tokens, _) = self.shape, x_TD.shape
        draws = tokens * step.budget.k_max
        gaussian_TZ = x_TD.new_empty(tokens, 2 * shape.latent_dim, dtype=torch.float32)
        gemm(x_TD, self.gaussian, gaussian_TZ, tile=row_tile(tokens))
        z_RZ = gaussian_TZ.new_empty(draws, shape.latent_dim)
        counts_T = step.budget.counts_T
        draw(gaussian_TZ, step.seeds_T, step.positions_T, counts_T, step.moe_layer, shape, self.table, z_RZ)
        score_RE = z_RZ.new_empty(draws, shape.blocks)
        gemm(z_RZ, self.scores, score_RE, tile=row_tile(draws))
        mask_TE = z_RZ.new_empty(tokens, shape.blocks)
        keep(score_RE, counts_T, shape, mask_TE)
        return mask_TE

    def run_masked(self, x_TD: Tensor, mask_TE: Tensor) -> Tensor:
        """down(activation(up(x)) · mask), of the kept units only."""
        tile = row_tile(len(x_TD))
        steps = kept_steps(mask_TE, self.shape.units, tile.rows)
        h_TF = x_TD.new_empty(len(x_TD), self.shape.units)
        masked_up(x_TD, self.up_FD, mask_TE, steps, self.shape.activation, tile, h_TF)
        y_TD = x_TD.new_empty(x_TD.shape, dtype=torch.float32)
        masked_down(h_TF, self.down_DF, mask_TE, steps, tile, y_TD)
        return y_TD


def infinity_layer(module: InfinityMixture) -> InfinityLayer:
    """The layer of a module; only the scores' weights are copied, to float32."""
    return InfinityLayer(
        shape=module.config,
        gaussian=Weight(module.router[None]),
        scores=Weight(module.scores[None].float()),
        up_FD=module.up,
        down_DF=module.down,
        table=noise_table(module.config, module.up),
    )
