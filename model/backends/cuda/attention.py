"""One layer of grouped-query attention on a GPU: projection, heads and cache, attention, output, residual, next norm.

Not here: latent attention, recurrent layers, and where a step's tokens lie (`places.py`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention.attention import SelfAttention
from model.backends.cuda.kernels.attend import WIDEST, attend
from model.backends.cuda.kernels.gemm import gemm
from model.backends.cuda.kernels.norm import Norm, residual_norm
from model.backends.cuda.kernels.operands import Weight
from model.backends.cuda.kernels.rotary import HeadNorms, rotary
from model.backends.cuda.layer import row_tile
from model.backends.cuda.places import Places
from model.backends.cuda.quantise import AS_LOADED, Precision
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
        positions_T: Tensor | None = None,
    ) -> None:
        """Add scale · attention(normed) to the residual `x_TD`, in place, and write its norm to `out_TD`.

        Raises:
            ValueError: queries grow with their position (`floor_scale`), and there are no positions.
        """
        mixed_TX = self.mix(normed_TD, rotary_tables, places, cache_PSGC, positions_T)
        y_TD = x_TD.new_empty(x_TD.shape, dtype=torch.float32)
        gemm(mixed_TX, self.out, y_TD, tile=row_tile(len(x_TD)))
        residual_norm(x_TD, next_norm, out_TD, y_TD, scale)

    def mix(
        self,
        normed_TD: Tensor,
        rotary_tables: Tables | None,
        places: Places,
        cache_PSGC: Tensor,
        positions_T: Tensor | None = None,
    ) -> Tensor:
        """What the heads see, side by side [T, H · C]; new keys and values are written to the cache first."""
        tokens, shape = len(normed_TD), self.shape
        qkv_TX = normed_TD.new_empty(tokens, self.qkv.units)
        gemm(normed_TD, self.qkv, qkv_TX, tile=row_tile(tokens))
        q_THC = normed_TD.new_empty(tokens, shape.heads, shape.head_width)
        rotary(qkv_TX, shape, self.norms, rotary_tables, places.slots_T, q_THC, cache_PSGC, positions_T)
        gate_THC = None
        if shape.gated:
            both_THX = qkv_TX[:, : 2 * shape.heads * shape.head_width].unflatten(-1, (shape.heads, -1))
            gate_THC = both_THX[..., shape.head_width :]
        mixed_THC = normed_TD.new_empty(q_THC.shape)
        sequences = (places.tables_BP, places.spans_B3, places.tiles, places.longest)
        attend(q_THC, cache_PSGC, *sequences, self.mask_spec, mixed_THC, gate_THC=gate_THC)
        return mixed_THC.flatten(1)


def attention_refusal(shape: Attention) -> str | None:
    """Why this layer has no kernels, or None."""
    if not shape.causal:
        return "attention to later tokens has no GPU kernel"
    if shape.gated and shape.qk_norm == "full":
        return "a norm over all heads beside gates has no GPU kernel"
    if shape.head_width > WIDEST:
        return f"heads of more than {WIDEST} elements have no GPU kernel, these have {shape.head_width}"
    return None


def attention_layer(
    module: SelfAttention, eps: float, offset: float = 0.0, precision: Precision = AS_LOADED
) -> AttentionLayer:
    """The layer of a module whose shape `attention_refusal` lets pass. `eps` and `offset` are those of the decoder's
    norms. Weights that `precision` keeps as they are are not copied.

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
        precision.linear(Weight(linear.weight[None], None if linear.bias is None else linear.bias[None]))
        for linear in (module.qkv, module.out)
    )
    return AttentionLayer(shape, qkv, out, norms, module.mask_spec)
