"""What each native op computes, in plain torch and float64: the definition that tests hold the kernels to.

Inputs are rounded where the kernels round them, and in the same way (`encode`). What is left between the two is the
order of float32 sums, and now and then a number so close to a tie that it is rounded to the other side. Attention
is in `reference_attention`, mixtures are in `reference_mixtures`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from model.activation import activate, activate_gated
from model.backends.cpu.kernels.pack import HALF, Kind, Packed, unpack
from model.moe.base import RoutedPairs
from model.shapes.mixtures import Activation

BLOCK = 256  # inputs that share a scale where a grouped matrix multiplies them


def encode(x_RK: Tensor, kind: Kind) -> Tensor:
    """What a matrix of this kind multiplies in place of float32 rows. A row that is not finite has no int8 form."""
    x_RK = x_RK.float()
    if kind == "float":
        return x_RK.double()
    if kind == "grouped":
        return torch.cat([encode(block_RK, "int8") for block_RK in x_RK.split(BLOCK, -1)], dim=-1)
    if kind != "int8":
        return x_RK.bfloat16().double()
    most_R1 = x_RK.abs().amax(-1, keepdim=True)
    steps_RK = (x_RK.double() * (127 / most_R1).double()).round()
    return torch.where(most_R1 == 0, 0, steps_RK * (most_R1 / 127).double())


@dataclass(frozen=True, slots=True)
class Weight:
    """The values [E, n, k] of packed matrices, float64, the kind that says how inputs are rounded, and a bias [n], or
    of every matrix its own [E, n]."""

    values_ENK: Tensor
    kind: Kind
    bias: Tensor | None = None

    @staticmethod
    def of(packed: Packed, experts: int = 1, bias: Tensor | None = None) -> "Weight":
        return Weight(unpack(packed, experts).double(), packed.kind, bias)

    def __call__(self, x_RK: Tensor, expert: int = 0) -> Tensor:
        """W x + bias, [R, n] float64."""
        y_RN = self.product(x_RK, expert)
        return y_RN if self.bias is None else y_RN + self.bias_of(expert)

    def product(self, x_RK: Tensor, expert: int = 0) -> Tensor:
        """W x alone."""
        return encode(x_RK, self.kind) @ self.values_ENK[expert].T

    def bias_of(self, expert: int) -> Tensor:
        """The bias of a matrix, float64; zeros where there is none."""
        if self.bias is None:
            return self.values_ENK.new_zeros(self.values_ENK.shape[1])
        return (self.bias if self.bias.dim() == 1 else self.bias[expert]).double()


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm, or LayerNorm with a bias; without a weight the rows stay as they are."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5

    def __call__(self, x_TD: Tensor) -> Tensor:
        if self.weight is None:
            return x_TD
        weight, shape = self.weight.double(), x_TD.shape[-1:]
        if self.bias is None:
            return F.rms_norm(x_TD.double(), shape, weight, self.eps).float()
        return F.layer_norm(x_TD.double(), shape, weight, self.bias.double(), self.eps).float()


def linear(x_TD: Tensor, norm: Norm, weight: Weight, scale: float = 1.0) -> Tensor:
    """scale · (W norm(x) + bias)."""
    return weight(norm(x_TD)) * scale


def argmax(logits_BV: Tensor) -> Tensor:
    """The lowest index of each row's highest value; -1 where one is not finite."""
    finite_B = logits_BV.isfinite().all(-1)
    lowest_B = (logits_BV == logits_BV.amax(-1, keepdim=True)).long().argmax(-1)
    return lowest_B.where(finite_B, -1)


def constrain(logits_BV: Tensor, raw_BV: Tensor, allowed_MW: Tensor, mask_of_B: Tensor) -> Tensor:
    """Logits with what each row's mask forbids at -inf; `mask_of_B` is -1 where a row has none.

    Bit i % 32 of word i // 32 allows token i. A row left without a finite value is taken from `raw_BV`, masked too.
    """
    bits_MW32 = allowed_MW[:, :, None] >> torch.arange(32, dtype=torch.int32) & 1
    allowed_MV = bits_MW32.bool().flatten(1)[:, : logits_BV.shape[1]]
    free_B1 = (mask_of_B < 0)[:, None]
    allowed_BV = torch.ones_like(logits_BV).bool()
    if len(allowed_MV):
        allowed_BV = allowed_MV[mask_of_B.clamp_min(0)] | free_B1
    some_B1 = (allowed_BV & logits_BV.isfinite()).any(-1, keepdim=True) | free_B1
    return logits_BV.where(some_B1, raw_BV).where(allowed_BV, -torch.inf)


@dataclass(frozen=True, slots=True)
class Experts:
    """Feed-forward experts: up [E, F, D], or gated [E, 2F, D] in the order of `pack.interleave`; down [E, D, F]."""

    up: Weight
    down: Weight
    gated: bool
    activation: Activation
    weigh_input: bool = False  # a pair's weight multiplies what its expert reads

    def hidden(self, x_RD: Tensor, expert: int, weight_R1: Tensor | float = 1.0) -> Tensor:
        """[R, F] of weighted inputs; gated, F is padded to a multiple of 16 with units that are 0."""
        h_RF = self.up.product(x_RD, expert) * weight_R1 + self.up.bias_of(expert)
        if not self.gated:
            return activate(h_RF, self.activation)
        gate_RF, up_RF = part_gates(h_RF)
        return activate_gated(gate_RF, up_RF, self.activation)

    def out(self, h_RF: Tensor, expert: int, weight_R1: Tensor | float = 1.0) -> Tensor:
        """[R, D] of activated and weighted units, padded or cut to what `down` takes; the bias times the weight."""
        missing = self.down.values_ENK.shape[-1] - h_RF.shape[-1]
        return self.down.product(F.pad(h_RF, (0, missing)), expert) + weight_R1 * self.down.bias_of(expert)


def part_gates(rows_RN: Tensor) -> tuple[Tensor, Tensor]:
    """Undo `pack.interleave` on the last dimension: gates, then ups, each padded."""
    whole = rows_RN.shape[-1] // (2 * HALF) * (2 * HALF)
    last_gates, last_ups = rows_RN[:, whole:].chunk(2, dim=-1)
    if not whole:
        return last_gates, last_ups
    pairs = rows_RN[:, :whole].unflatten(-1, (-1, 2, HALF))
    gates, ups = pairs[..., 0, :].flatten(1), pairs[..., 1, :].flatten(1)
    return torch.cat([gates, last_gates], -1), torch.cat([ups, last_ups], -1)


def experts(x_TD: Tensor, pairs: RoutedPairs, layer: Experts) -> Tensor:
    """Σ over each row's pairs of weight · expert(x), or of expert(weight · x).

    The weight meets the activated units, before they are rounded, or the sums of the first product.
    """
    y_TD, start = torch.zeros_like(x_TD, dtype=torch.float64), 0
    for expert, end in enumerate(pairs.ends_E.tolist()):
        if end > start:
            token_r = pairs.token_R[start:end].long()
            weight_r1 = pairs.weight_R[start:end, None].double()
            of_input, of_output = (weight_r1, 1.0) if layer.weigh_input else (1.0, weight_r1)
            h_rF = layer.hidden(x_TD[token_r], expert, of_input) * of_output
            y_TD.index_add_(0, token_r, layer.out(h_rF, expert, of_output))
            start = end
    return y_TD


def ffn_block(x_TD: Tensor, norm: Norm, layer: Experts, residual_scale: float = 1.0) -> Tensor:
    """x + residual_scale · feed-forward(norm(x))."""
    return x_TD + residual_scale * layer.out(layer.hidden(norm(x_TD), 0), 0)
