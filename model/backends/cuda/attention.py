"""One layer of grouped-query attention on a GPU: projection, heads and cache, attention, output, residual, next norm.

Not here: latent attention, recurrent layers, and where a step's tokens lie (`places.py`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention.attention import SelfAttention
from model.backends.cuda.kernels.attend import attend
from model.backends.cuda.kernels.gemm import gemm
from model.backends.cuda.kernels.norm import Norm, residual_norm
from model.backends.cuda.kernels.operands import Weight
from model.backends.cuda.kernels.rotary import HeadNorms, rotary
from model.backends.cuda.layer import row_tile
from model.backends.cuda.places import Places
from model.shapes.attention import Attention
from model.step import MaskSpec, Tables


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """The weights of a layer's attention as the kernels read them; the parameters of the module it was made of."""

    shape: Attention
    qkv: Weight
    out: Weight
    norms: HeadNorms
    mask_spec: MaskSpec

    def __call__(
        self,
        normed_TD: Tensor,
        rotary_tables: Tables | None,
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

    def mix(self, normed_TD: Tensor, rotary_tables: Tables | None, places: Places, cache_PSGC: Tensor) -> Tensor:
        """What the heads see, side by side [T, H · C]; new keys and values are written to the cache first."""
        tokens, shape = len(normed_TD), self.shape
        qkv_TX = normed_TD.new_empty(tokens, self.qkv.units)
        gemm(normed_TD, self.qkv, qkv_TX, tile=row_tile(tokens))
        q_THC = normed_TD.new_empty(tokens, shape.heads, shape.head_width)
        rotary(qkv_TX, shape, self.norms, rotary_tables, places.slots_T, q_THC, cache_PSGC)
        mixed_THC = normed_TD.new_empty(q_THC.shape)
        sequences = (places.tables_BP, places.spans_B3, places.tiles, places.longest)
        attend(q_THC, cache_PSGC, *sequences, self.mask_spec, mixed_THC)
        return mixed_THC.flatten(1)


def attention_refusal(shape: Attention) -> str | None:
    """Why this layer has no kernels, or None."""
    if shape.gated:
        return "a gate beside the queries has no GPU kernel"
    if shape.floor_scale is not None:
        return "queries scaled by their position have no GPU kernel"
    return None


def attention_layer(module: SelfAttention, eps: float, offset: float = 0.0) -> AttentionLayer:
    """The layer of a module whose shape `attention_refusal` lets pass; weights are not copied. `eps` and `offset` are
    those of the decoder's norms.

    Raises:
        ValueError: it does not.
    """
    shape, reason = module.shape, attention_refusal(module.shape)
    if reason is not None:
        raise ValueError(reason)
    has_weights = shape.qk_norm in ("full", "head")
    norms = HeadNorms(
        query=module.q_norm.weight if has_weights else None,
        key=module.k_norm.weight if has_weights else None,
        eps=eps,
        offset=offset,
        full=shape.qk_norm == "full",
        unit=shape.qk_norm == "unit",
    )
    qkv, out = (
        Weight(linear.weight[None], None if linear.bias is None else linear.bias[None])
        for linear in (module.qkv, module.out)
    )
    return AttentionLayer(shape, qkv, out, norms, module.mask_spec)
