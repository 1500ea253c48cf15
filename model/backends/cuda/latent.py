"""One layer of latent attention (MLA) on a GPU, in its absorbed form: only a latent and a rotary key of each token are
kept, and queries are turned into the space of the latents.

Not here: grouped-query attention (`attention.py`), and where a step's tokens lie (`places.py`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.attention.mla import MLAAttention
from model.backends.cuda.kernels.gemm import gemm
from model.backends.cuda.kernels.latent_attend import WIDEST, attend_latent
from model.backends.cuda.kernels.latent_rotary import latent_rotary
from model.backends.cuda.kernels.norm import Norm, residual_norm
from model.backends.cuda.kernels.operands import Weight
from model.backends.cuda.kernels.per_head import per_head
from model.backends.cuda.layer import row_tile
from model.backends.cuda.places import Places
from model.backends.cuda.quantise import AS_LOADED, Precision
from model.shapes.attention import MLA
from model.step import Tables


@dataclass(frozen=True, slots=True)
class LatentLayer:
    """The weights of a layer's latent attention as the kernels read them; the parameters of the module it was made of.

    With `query_down` queries go through a latent of their own, which `query_norm` norms. `up_HXR` makes keys and values
    of a latent.
    """

    shape: MLA
    query_down: Weight | None
    query_norm: Norm | None
    query: Weight
    down: Weight
    norm: Norm
    up_HXR: Tensor
    out: Weight
    scale: float

    def __call__(
        self,
        normed_TD: Tensor,
        rotary_tables: Tables,
        places: Places,
        cache_PSGC: Tensor,
        x_TD: Tensor,
        next_norm: Norm,
        out_TD: Tensor,
        scale: float = 1.0,
    ) -> None:
        """Add scale · attention(normed) to the residual `x_TD`, in place, and write its norm to `out_TD`."""
        mixed_TX = self.mix(normed_TD, rotary_tables, places, cache_PSGC)
        y_TD = x_TD.new_empty(x_TD.shape, dtype=torch.float32)
        gemm(mixed_TX, self.out, y_TD, tile=row_tile(len(x_TD)))
        residual_norm(x_TD, next_norm, out_TD, y_TD, scale)

    def mix(self, normed_TD: Tensor, rotary_tables: Tables, places: Places, cache_PSGC: Tensor) -> Tensor:
        """The values of all heads side by side [T, H · V]; the new latents are written to the cache first."""
        s, tile = self.shape, row_tile(len(normed_TD))
        q_TX = self._queries(normed_TD)
        latent_TC = normed_TD.new_empty(len(normed_TD), self.down.units)
        gemm(normed_TD, self.down, latent_TC, tile=tile)
        q_THC = normed_TD.new_empty(len(normed_TD), s.heads, self.down.units)
        latent_rotary(q_TX, latent_TC, s, self.norm, rotary_tables, places.slots_T, q_THC, cache_PSGC)
        to_keys_HNR, to_values_HVR = self.up_HXR.split((s.plain_width, s.value_width), 1)
        plain_THN = q_TX.unflatten(-1, (s.heads, -1))[..., : s.plain_width]
        per_head(plain_THN, to_keys_HNR.mT, q_THC[..., : s.rank], tile)
        mixed_THR = normed_TD.new_empty(len(normed_TD), s.heads, s.rank)
        sequences = (places.tables_BP, places.spans_B3, places.tiles, places.longest)
        attend_latent(q_THC, cache_PSGC, *sequences, self.scale, mixed_THR)
        value_THV = normed_TD.new_empty(len(normed_TD), s.heads, s.value_width)
        per_head(mixed_THR, to_values_HVR, value_THV, tile)
        return value_THV.flatten(1)

    def _queries(self, normed_TD: Tensor) -> Tensor:
        """Plain and rotary part of each head side by side [T, H · (N + W)]."""
        tokens, tile = len(normed_TD), row_tile(len(normed_TD))
        if self.query_down is not None:
            assert self.query_norm is not None
            latent_TQ = normed_TD.new_empty(tokens, self.query_down.units)
            gemm(normed_TD, self.query_down, latent_TQ, tile=tile)
            normed_TD = latent_TQ.new_empty(latent_TQ.shape)
            residual_norm(latent_TQ, self.query_norm, normed_TD)
        q_TX = normed_TD.new_empty(tokens, self.query.units)
        gemm(normed_TD, self.query, q_TX, tile=tile)
        return q_TX


def latent_refusal(shape: MLA) -> str | None:
    """Why this layer has no kernels, or None."""
    if shape.rank > WIDEST:
        return f"latents of more than {WIDEST} elements have no GPU kernel, these have {shape.rank}"
    return None


def latent_layer(module: MLAAttention, precision: Precision = AS_LOADED) -> LatentLayer:
    """The layer of a module whose shape `latent_refusal` lets pass. Weights that `precision` keeps as they are are not
    copied; what makes keys and values of a latent always stays as it is.

    Raises:
        ValueError: it does not.
    """
    shape, reason = module.shape, latent_refusal(module.shape)
    if reason is not None:
        raise ValueError(reason)
    two_steps = shape.query_rank is not None

    def dense(linear: nn.Linear) -> Weight:
        return precision.linear(Weight(linear.weight[None], None if linear.bias is None else linear.bias[None]))

    return LatentLayer(
        shape=shape,
        query_down=dense(module.query_down) if two_steps else None,
        query_norm=Norm(module.query_norm.weight, shape.norm_eps) if two_steps else None,
        query=dense(module.query),
        down=dense(module.down),
        norm=Norm(module.norm.weight, shape.norm_eps),
        up_HXR=module.up.weight.unflatten(0, (shape.heads, -1)),
        out=dense(module.out),
        scale=module.mask_spec.scale,
    )
