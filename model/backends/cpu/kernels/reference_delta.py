"""What the op of a gated delta net computes, in plain torch and float64; the rest of the ops are in `reference`.

Channels, heads and rates lie as in csrc/delta.h: queries, keys, values, gates; β, decay.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from model.backends.cpu.kernels.reference import Norm, Weight


@dataclass(frozen=True, slots=True)
class DeltaBlock:
    """One layer: what `delta_block` is given beside rows and states."""

    norm: Norm
    project: Weight
    rates: Weight
    convolution_JC: Tensor
    decay_H: Tensor  # padded, as the rates are
    head_norm: Norm
    out: Weight
    key_heads: int
    heads: int
    key_width: int
    value_width: int

    @property
    def channels(self) -> int:
        return self.convolution_JC.shape[1]


@dataclass(slots=True)
class States:
    """What is kept of each sequence: the inputs of the convolution so far, and a matrix per head."""

    inputs: dict[int, Tensor] = field(default_factory=dict)
    matrix_HKV: dict[int, Tensor] = field(default_factory=dict)


def delta_block(x_TD: Tensor, states: States, spans_B3: Tensor, slots_B: Tensor, block: DeltaBlock) -> Tensor:
    """x + gated delta net(norm(x)); the states move on."""
    normed_TD = block.norm(x_TD)
    mixed_TC, gate_TX = block.project(normed_TD).split((block.channels, block.heads * block.value_width), dim=-1)
    beta_TH, step_TH = block.rates(normed_TD).chunk(2, dim=-1)
    decay_TH = (block.decay_H.double() * F.softplus(step_TH)).exp()
    y_TX = torch.zeros_like(gate_TX)
    for (first, rows, context), slot in zip(spans_B3.tolist(), slots_B.tolist(), strict=True):
        new = slice(first, first + rows)
        if context == rows:
            states.inputs[slot] = mixed_TC[:0]
            states.matrix_HKV[slot] = torch.zeros(block.heads, block.key_width, block.value_width).double()
        states.inputs[slot] = torch.cat([states.inputs[slot], mixed_TC[new]])
        convolved_RC = convolve(states.inputs[slot], block.convolution_JC.double())[-rows:]
        y_TX[new] = recur(convolved_RC, beta_TH[new].sigmoid(), decay_TH[new], states.matrix_HKV[slot], block)
    heads_THV = block.head_norm(y_TX.unflatten(-1, (block.heads, -1)))
    gated_TX = heads_THV.flatten(1) * F.silu(gate_TX)
    return x_TD + block.out(gated_TX)


def convolve(inputs_SC: Tensor, factor_JC: Tensor) -> Tensor:
    """silu of the causal convolution of a whole sequence."""
    taps = len(factor_JC)
    padded_SC = F.pad(inputs_SC, (0, 0, taps - 1, 0))
    terms = [padded_SC[tap : tap + len(inputs_SC)] * factor_JC[tap] for tap in range(taps)]
    return F.silu(torch.stack(terms).sum(0))


def recur(convolved_RC: Tensor, beta_RH: Tensor, decay_RH: Tensor, matrix_HKV: Tensor, block: DeltaBlock) -> Tensor:
    """What the heads read at each row, [R, H · V]; the matrices move on."""
    keys, values = block.key_heads * block.key_width, block.heads * block.value_width
    q_RX, k_RX, v_RX = convolved_RC.split((keys, keys, values), dim=-1)
    q_RHK, k_RHK = (_unit_heads(part, block) for part in (q_RX, k_RX))
    v_RHV, out = v_RX.unflatten(-1, (block.heads, -1)), []
    for r in range(len(v_RHV)):
        for head in range(block.heads):
            matrix_KV, key_K = matrix_HKV[head], k_RHK[r, head]
            matrix_KV *= decay_RH[r, head]
            matrix_KV += torch.outer(key_K, beta_RH[r, head] * (v_RHV[r, head] - key_K @ matrix_KV))
        out.append(torch.einsum("hkv,hk->hv", matrix_HKV, q_RHK[r]) * block.key_width**-0.5)
    return torch.stack(out).flatten(1)


def _unit_heads(part_RX: Tensor, block: DeltaBlock) -> Tensor:
    """Queries or keys of length one, repeated for the heads that share them."""
    heads_RGK = part_RX.unflatten(-1, (block.key_heads, -1))
    unit_RGK = heads_RGK / (heads_RGK.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    return unit_RGK.repeat_interleave(block.heads // block.key_heads, dim=1)
