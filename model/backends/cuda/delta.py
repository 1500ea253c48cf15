"""One gated delta net on a GPU (Qwen3-Next): projections, convolution, delta rule, gated norm, output, residual, norm.

Not here: attention (`attention.py`, `latent.py`), and which slot a sequence's state has.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention.gated_delta_net import GatedDeltaNetAttention
from model.backends.cuda.kernels.convolution import convolve
from model.backends.cuda.kernels.delta_rule import WIDEST, delta_rule
from model.backends.cuda.kernels.gated_norm import gated_norm
from model.backends.cuda.kernels.gemm import gemm
from model.backends.cuda.kernels.norm import Norm, residual_norm
from model.backends.cuda.kernels.operands import Weight
from model.backends.cuda.layer import row_tile
from model.backends.cuda.quantise import AS_LOADED, Precision
from model.shapes.attention import GatedDeltaNet


@dataclass(frozen=True, slots=True)
class DeltaLayer:
    """The weights of a gated delta net as the kernels read them; the parameters of the module it was made of."""

    shape: GatedDeltaNet
    project: Weight
    rates: Weight
    convolution_CJ: Tensor
    step_bias_H: Tensor
    log_decay_H: Tensor
    norm: Norm
    out: Weight

    def __call__(
        self,
        normed_TD: Tensor,
        spans_B3: Tensor,
        slots_B: Tensor,
        state_SX: Tensor,
        x_TD: Tensor,
        next_norm: Norm,
        out_TD: Tensor,
        scale: float = 1.0,
    ) -> None:
        """Add scale · net(normed) to the residual `x_TD`, in place, and write its norm to `out_TD`.

        `slots_B` names each sequence's row of the states [slots, X], float32, which move on with it. Sequences without
        new tokens keep theirs.
        """
        mixed_TX = self.mix(normed_TD, spans_B3, slots_B, state_SX)
        y_TD = x_TD.new_empty(x_TD.shape, dtype=torch.float32)
        gemm(mixed_TX, self.out, y_TD, tile=row_tile(len(x_TD)))
        residual_norm(x_TD, next_norm, out_TD, y_TD, scale)

    def mix(self, normed_TD: Tensor, spans_B3: Tensor, slots_B: Tensor, state_SX: Tensor) -> Tensor:
        """What the heads read from their states, side by side [T, H · V]."""
        tokens, s, tile = len(normed_TD), self.shape, row_tile(len(normed_TD))
        projected_TX = normed_TD.new_empty(tokens, self.project.units)
        gemm(normed_TD, self.project, projected_TX, tile=tile)
        rates_TX = normed_TD.new_empty(tokens, self.rates.units)
        gemm(normed_TD, self.rates, rates_TX, tile=tile)
        sequences = (state_SX, spans_B3, slots_B)
        convolved_TC = normed_TD.new_empty(tokens, s.channels, dtype=torch.float32)
        convolve(projected_TX, self.convolution_CJ, s, *sequences, convolved_TC)
        y_THV = convolved_TC.new_empty(tokens, s.value_heads, s.value_width)
        delta_rule(convolved_TC, rates_TX, self.step_bias_H, self.log_decay_H, s, *sequences, y_THV)
        gated_THV = normed_TD.new_empty(y_THV.shape)
        gated_norm(y_THV, projected_TX, self.norm, s, gated_THV)
        return gated_THV.flatten(1)


def delta_refusal(shape: GatedDeltaNet) -> str | None:
    """Why this layer has no kernels, or None."""
    if shape.key_width > WIDEST:
        return f"keys of more than {WIDEST} elements have no GPU kernel, these have {shape.key_width}"
    return None


def delta_layer(module: GatedDeltaNetAttention, precision: Precision = AS_LOADED) -> DeltaLayer:
    """The layer of a module whose shape `delta_refusal` lets pass. Weights that `precision` keeps as they are are not
    copied; rates, as other gates, always stay as they are.

    Raises:
        ValueError: it does not.
    """
    shape, reason = module.shape, delta_refusal(module.shape)
    if reason is not None:
        raise ValueError(reason)
    return DeltaLayer(
        shape=shape,
        project=precision.linear(Weight(module.project.weight[None])),
        rates=Weight(module.rates.weight[None]),
        convolution_CJ=module.convolution[:, 0],
        step_bias_H=module.step_bias,
        log_decay_H=module.log_decay,
        norm=Norm(module.norm.weight, module.norm.eps),
        out=precision.linear(Weight(module.out.weight[None])),
    )
